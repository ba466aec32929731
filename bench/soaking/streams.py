"""Streams that both ends know, and what the first bytes of a session ask for."""

import random
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

_PERIOD = (1 << 20) + 4099
"""Bytes after which a stream repeats; no multiple of any buffer's size."""
_LARGEST = 1 << 17
"""Bytes of the largest piece."""
HEADER = struct.Struct("<cQQ")
"""What the client asks for (``STREAM``, ``ECHO``), the seed, and the bytes each way."""
STREAM, ECHO = b"S", b"E"


class Wrong(Exception):
    """A byte is not what was sent, or the stream ended early."""


class Stream:
    """The stream of a seed, piece by piece, and the sizes of the pieces."""

    def __init__(self, seed: int, total: int) -> None:
        self._random = random.Random(seed)
        once = self._random.randbytes(_PERIOD)
        self._data = once + once[:_LARGEST]
        self._at = 0
        self._total = total

    @property
    def left(self) -> int:
        """Bytes still to come."""
        return self._total - self._at

    def size(self) -> int:
        """Return the size of some piece; small ones are as likely as large ones."""
        return min(int(2 ** self._random.uniform(0, 17)), self.left)

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        start = self._at % _PERIOD
        self._at += size
        return self._data[start : start + size]


def send(conn: Any, seed: int, total: int) -> None:
    """Send a stream, and end this direction."""
    stream = Stream(seed, total)
    while stream.left:
        conn.sendall(stream.take(stream.size()))
    conn.shutdown(socket.SHUT_WR)


def receive(conn: Any, seed: int, total: int) -> None:
    """Receive a stream to its end, and check every byte."""
    stream = Stream(seed, total)
    while data := conn.recv(_LARGEST):
        at = total - stream.left
        if len(data) > stream.left or data != stream.take(len(data)):
            raise Wrong(f"stream {seed}: wrong bytes among the {len(data)} from {at} on")
    if stream.left:
        raise Wrong(f"stream {seed}: it ended {stream.left} bytes early")


def exchange(conn: Any, sent: int, received: int, total: int) -> None:
    """Send the stream of one seed and receive that of another at once."""
    failures: list[BaseException] = []

    def other() -> None:
        try:
            send(conn, sent, total)
        except BaseException as error:
            failures.append(error)

    sending = threading.Thread(target=other)
    sending.start()
    try:
        receive(conn, received, total)
    except BaseException:
        conn.close()  # so that the other thread does not wait
        raise
    finally:
        sending.join()
    if failures:
        raise failures[0]


def receive_exactly(recv: Callable[[int], bytes], size: int) -> bytes:
    """Receive so many bytes, or fewer if the stream ends."""
    parts = []
    while size and (part := recv(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
