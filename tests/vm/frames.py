"""What travels between pytest and the agent of a machine: frames with a header of nine bytes."""

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = struct.Struct("<BII")


class Kind(enum.IntEnum):
    READY = 0
    """From the agent, first: it runs."""
    START = 1
    """To the agent: run the function of this body, a pickled (function, arguments)."""
    DATA = 2
    """Either way: a pickled value for the job, or from it."""
    KILL = 3
    """To the agent: kill the job's processes."""
    EXITED = 4
    """From the agent: the job's process has ended; its exit status in the body, as text."""


class Frame(NamedTuple):
    kind: Kind
    job: int
    body: bytes


def encode(kind: Kind, job: int = 0, body: bytes = b"") -> bytes:
    return _HEADER.pack(kind, job, len(body)) + body


class Decoder:
    """Frames out of a stream of bytes."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that ``data`` completes."""
        self._pending += data
        while len(self._pending) >= _HEADER.size:
            kind, job, size = _HEADER.unpack_from(self._pending)
            end = _HEADER.size + size
            if len(self._pending) < end:
                return
            body = self._pending[_HEADER.size : end]
            self._pending = self._pending[end:]
            yield Frame(Kind(kind), job, body)
