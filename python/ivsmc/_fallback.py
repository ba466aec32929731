"""Why a session goes over TCP, and the log line about it."""

import logging
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["FallbackReason", "log_once"]

_LOG = logging.getLogger("ivsmc")
_LOGGED: set[tuple[str, Any]] = set()
_MOST_LOGGED = 1000
"""Reasons and addresses remembered; after that all are news again."""


@dataclass(frozen=True, slots=True)
class FallbackReason:
    """Why a session is not on shared memory; ``session.fallback_reason``.

    The README lists every ``name``. ``str()`` gives one line for a log.
    """

    name: str
    """Stable name, such as ``"PEER_NO_SMC"``."""
    code: int
    """SMC's diagnosis code (Linux ``net/smc/smc_clc.h``); the peer's own where it declined."""
    sentence: str
    """One sentence for people; names the regions that were looked at."""
    side: Literal["local", "peer"]
    """Whose side it was."""

    def __str__(self) -> str:
        return f"{self.name} ({self.code:#010x}, {self.side} side): {self.sentence}"


def log_once(reason: FallbackReason | None, address: Any, doing: str) -> None:
    """Log ``reason`` at level INFO, once for each reason and address (host, or host and port)."""
    if reason is None or (reason.name, address) in _LOGGED:
        return
    if len(_LOGGED) >= _MOST_LOGGED:
        _LOGGED.clear()
    _LOGGED.add((reason.name, address))
    _LOG.info("%s %s over TCP: %s", doing, address, reason)
