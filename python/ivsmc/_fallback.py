"""Why a session goes over TCP."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["FallbackReason"]


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
