"""Programs of ``bench/`` that look for faults, run as users run them."""

import signal
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"


def look_for_faults(program: str, *arguments: object) -> tuple[int, str]:
    """The status of a program, and all that it says; the last line is the verdict."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", BENCH / program, *map(str, arguments)],
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
    assert not list(Path("/dev/shm").glob(f"ivsmc-*-{process.pid}-*"))
    return process.returncode, said
