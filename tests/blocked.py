"""When a thread of another process, or of this one, sleeps in a call that waits."""

import time
from pathlib import Path

TRIES = 60_000
"""Looks of one wait, of a millisecond each at most: only a hang comes to their end."""
LOOKS = 3
"""Looks in a row that must find the thread asleep in one and the same sleep."""


def until_blocked(pid: int, thread: int | None = None) -> None:
    """Return once ``thread`` of the process ``pid`` (its main one unless given) stays asleep.

    There is no event to wait for: it says that it is about to call, and nothing more.
    """
    task = Path(f"/proc/{pid}/task/{thread or pid}")
    seen = 0
    before = None
    for _ in range(TRIES):
        asleep, now = _look(task)
        seen = seen + 1 if asleep and now == before else 0
        if seen == LOOKS:
            return
        before = now
        time.sleep(0.001)
    raise AssertionError(f"{task} does not block: {(task / 'stat').read_text()}")


def _look(task: Path) -> tuple[bool, str]:
    """Whether the thread is asleep, and how often it has gone to sleep."""
    status = dict(
        line.split(":", 1) for line in (task / "status").read_text().splitlines() if ":" in line
    )
    return status["State"].strip().startswith("S"), status["voluntary_ctxt_switches"]
