"""Mixed load: ``bench/soak.py`` finds nothing, and finds what is made wrong on purpose."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "bench" / "soak.py"


def soak(*arguments: object) -> tuple[int, str]:
    """Its status, and all that it says; the last line is the verdict."""
    with subprocess.Popen(
        # How much slower round trips become in seconds is for runs of hours to say.
        [sys.executable, "-W", "error", PROGRAM, "--drift", "1000", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGINT)  # it then removes what it has made
            raise
    print(said)  # seen when the test fails; the first line has the seed
    return process.returncode, said


@pytest.mark.parametrize("device", ["local", "file", "host"])
def test_mixed_load_leaves_nothing(device: str) -> None:
    status, said = soak("--device", device, "--seconds", 4, "--rounds", 4)
    assert status == 0, said
    counted = re.match(r"soak: OK, 0 faults: .* (\d+) sessions, ", said.splitlines()[-1])
    assert counted, said
    assert int(counted[1]) > 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("byte", "wrong bytes among the"),
        ("descriptor", "visits: Weight("),
        ("memory", "bytes of memory more"),
    ],
)
def test_what_is_wrong_is_found(fault: str, words: str) -> None:
    status, said = soak("--seconds", 1, "--rounds", 2, "--fault", fault)
    assert status == 1
    assert words in said
    assert re.match(r"soak: FAILED, \d+ faults: ", said.splitlines()[-1])
