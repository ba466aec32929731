"""What the tests of commands have done in a guest."""

import subprocess

from processes import Here


def status_of(command: list[str]) -> tuple[int, str, str]:
    """Run a command; return its status and what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def hold_open(here: Here, path: str) -> None:
    """Keep the file ``path`` open until told otherwise."""
    with open(path, "r+b", buffering=0):
        here.send("open")
        here.receive()
