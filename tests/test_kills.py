"""Seeded kills: ``bench/kills.py`` finds nothing, and finds what is made wrong on purpose."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "bench" / "kills.py"
KILLS = {"local": 160, "file": 170, "host": 170}


def kills(*arguments: object) -> tuple[int, str]:
    """Its status, and all that it says; the last line is the verdict."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", PROGRAM, *map(str, arguments)],
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
    assert not list(Path("/dev/shm").glob(f"ivsmc-kills-{process.pid}-*"))
    return process.returncode, said


@pytest.mark.parametrize("device", KILLS)
def test_nothing_is_lost_and_nobody_is_hurt(device: str) -> None:
    status, said = kills("--device", device, "--iterations", KILLS[device])
    assert status == 0, said
    verdict = said.splitlines()[-1]
    counted = re.match(r"kills: OK, 0 faults: (\d+) kills, .* (\d+) sessions, ", verdict)
    assert counted, verdict
    assert int(counted[1]) >= KILLS[device]
    assert int(counted[2]) >= KILLS[device]


@pytest.mark.parametrize(
    ("fault", "words", "options"),
    [
        ("byte", "wrong bytes among the", ("--survivors", 4)),
        ("reset", "broke off, and its peer lives", ("--survivors", 4)),
        ("hang", "CONNECT in 0x", ("--patience", 5000, "--iterations", 100_000)),
        ("descriptor", "descriptors are left over", ()),
        ("leak", "left over in the region", ()),
    ],
)
def test_what_is_wrong_is_found(fault: str, words: str, options: tuple[object, ...]) -> None:
    status, said = kills("--device", "local", "--fault", fault, "--iterations", 10, *options)
    assert status == 1
    assert words in said
    assert re.match(r"kills: FAILED, \d+ faults: ", said.splitlines()[-1])
