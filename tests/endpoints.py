"""Connected pairs and what tests do with either end."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import ivsmc
from ivsmc import _native

Endpoint: TypeAlias = ivsmc.Session | socket.socket
LOOPBACK = ("127.0.0.1", 0)


class Receiver(Protocol):
    def recv(self, bufsize: int, flags: int = 0, /) -> bytes: ...


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, the connecting one first."""
    with socket.create_server(LOOPBACK) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def session_pair(device: str, *, buffer: int | None = None) -> tuple[ivsmc.Session, ivsmc.Session]:
    """Two ends of a session over ``device``, the connecting one first."""
    with ivsmc.create_server(LOOPBACK, device=device, buffer=buffer) as listener:
        near = ivsmc.create_connection(listener.getsockname(), device=device, buffer=buffer)
        far, _ = listener.accept()
    expected = "tcp" if device == "none" else "smc"
    assert (near.transport, far.transport) == (expected, expected), near.fallback_reason
    return near, far


@contextmanager
def hasty() -> Iterator[None]:
    """Connects of this process wait for a listener that will not take them only briefly."""
    _native.set_match_wait(100)
    try:
        yield
    finally:
        _native.set_match_wait(None)


def receive_exactly(stream: Receiver, size: int) -> bytes:
    """Receive ``size`` bytes, or fewer if the stream ends."""
    parts = []
    while size and (part := stream.recv(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive_all(stream: Receiver) -> bytes:
    """Receive until the stream ends."""
    parts = []
    while part := stream.recv(65536):
        parts.append(part)
    return b"".join(parts)


def fill(stream: Endpoint) -> int:
    """Send zeros until the stream takes no more; return how many. It is non-blocking after."""
    stream.setblocking(False)
    sent = 0
    while True:
        try:
            sent += stream.send(bytes(65536))
        except BlockingIOError:
            return sent
