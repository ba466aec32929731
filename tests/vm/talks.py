"""Both ends of the sessions between machines: what is said, and over what it went."""

import random
import socket
from dataclasses import dataclass

import ivsmc
from endpoints import Endpoint, receive_exactly
from processes import Here

LARGEST = 5000
"""Bytes of the largest ping."""


@dataclass(frozen=True)
class Path:
    """What a session went over, as its end says."""

    transport: str
    device: str | None
    reason: str | None
    """Name of the fallback reason."""

    @classmethod
    def of(cls, stream: Endpoint) -> "Path":
        if isinstance(stream, socket.socket):
            return cls("socket", None, None)
        reason = stream.fallback_reason
        return cls(stream.transport, stream.stats()["device"], reason.name if reason else None)


def answer_pings(here: Here, program: str, device: str | None, pings: int) -> Path:
    """Accept one connection and send what comes back, reversed; say the port first.

    ``program``: "ivsmc", or "plain" for one that knows sockets only.
    """
    anywhere = ("0.0.0.0", 0)
    listener: ivsmc.Listener | socket.socket
    if program == "ivsmc":
        listener = ivsmc.create_server(anywhere, device=device)
    else:
        listener = socket.create_server(anywhere)
    with listener:
        here.send(listener.getsockname()[1])
        stream, _ = listener.accept()
    with stream:
        for size in _sizes(pings):
            stream.sendall(receive_exactly(stream, size)[::-1])
        assert stream.recv(1) == b""
        return Path.of(stream)


def ping(program: str, device: str | None, address: tuple[str, int], pings: int) -> Path:
    """Connect to ``answer_pings`` and check its answers."""
    stream: Endpoint
    if program == "ivsmc":
        stream = ivsmc.create_connection(address, device=device)
    else:
        stream = socket.create_connection(address)
    with stream:
        data = random.Random(7)
        for size in _sizes(pings):
            sent = data.randbytes(size)
            stream.sendall(sent)
            assert receive_exactly(stream, size) == sent[::-1]
        return Path.of(stream)


def _sizes(pings: int) -> list[int]:
    sizes = random.Random(pings)
    return [sizes.randrange(1, LARGEST) for _ in range(pings)]
