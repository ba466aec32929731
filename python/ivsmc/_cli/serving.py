"""Serving until SIGINT or SIGTERM, which end it alike."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import ivsmc

_POLL_SECONDS = 60.0
"""Signals end a poll at once; this bounds one whose signal came just before it."""


def stop_on_sigterm() -> None:
    """Have SIGTERM raise ``KeyboardInterrupt``, as SIGINT does."""
    signal.signal(signal.SIGTERM, _stop)


def serve(daemon: ivsmc.Agent | ivsmc.Server, log: Callable[[str], None]) -> NoReturn:
    """Serve until something is raised, and tell ``log`` what happens."""
    while True:
        daemon.serve(_POLL_SECONDS, log)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
