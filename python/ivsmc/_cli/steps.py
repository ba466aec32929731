"""Changes to a machine, one step at a time: shown as the shell would do them, undone on failure."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ivsmc._cli.machine import Refused

__all__ = ["Step", "carry_out"]


@dataclass(frozen=True)
class Step:
    """One change."""

    command: str
    """What one would type in a root shell."""
    do: Callable[[], None]
    undo: Callable[[], None] | None = None
    """Takes it back; None where there is nothing to take back."""


def carry_out(steps: Iterator[Step], say: Callable[[str], None], *, dry_run: bool) -> list[str]:
    """Do the steps, each before the next one is worked out; return their commands.

    When one fails, those before it are undone, the last first, and ``Refused`` says what failed.
    """
    done: list[Step] = []
    try:
        for step in steps:
            say(f"+ {step.command}")
            if not dry_run:
                _do(step)
            done.append(step)
    except BaseException:
        if not dry_run:
            _undo(done, say)
        raise
    return [step.command for step in done]


def _do(step: Step) -> None:
    try:
        step.do()
    except PermissionError as error:
        raise Refused(f"{step.command}: {error.strerror}; this needs root (sudo)") from error
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"{step.command}: {error.strerror or error}") from error


def _undo(done: list[Step], say: Callable[[str], None]) -> None:
    for step in reversed(done):
        if step.undo is None:
            continue
        text = f"- undone: {step.command}"
        try:
            step.undo()
        except OSError as error:  # the first failure is what the caller hears of
            text = f"- not undone: {step.command}: {error.strerror or error}"
        with contextlib.suppress(OSError):  # who reads this may have gone: the rest is undone too
            say(text)
