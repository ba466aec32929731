"""Both ends of the sessions between machines: what is said, and over what it went."""

import contextlib
import os
import pathlib
import random
import socket
import time
from dataclasses import dataclass

import ivsmc
from endpoints import Endpoint, receive_exactly
from processes import Here

LARGEST = 5000
"""Bytes of the largest ping."""
TRIES = 30
"""To connect over shared memory: two guests and the host share two processors."""
WARM = 10
"""Rounds that are not counted: an end that has only just begun may still be looked for."""


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


def connect(address: tuple[str, int], device: str | None) -> ivsmc.Session:
    """Connect, over shared memory, however late an emulated listener takes its connections."""
    for _ in range(TRIES):
        with contextlib.suppress(ivsmc.SMCRequired):
            return ivsmc.create_connection(address, device=device, require="smc")
        time.sleep(1)  # connects are not tried again at once either (RECENTLY_NOT_MATCHED)
    return ivsmc.create_connection(address, device=device, require="smc")


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


@dataclass(frozen=True)
class Wakes:
    """How often an end was woken, and what for."""

    path: Path
    interrupts: int
    """Of the guest's device, while the session was used; 0 in the host, which has none."""
    stats: dict[str, int]

    def assert_by_doorbell(self, rounds: int) -> None:
        """It slept for most of so many rounds, and hardly a byte went over TCP to wake anyone."""
        assert self.stats["doorbells_sent"] >= rounds // 2
        assert self.stats["doorbells_received"] >= rounds // 2
        assert self.stats["wakes_sent"] < rounds // 10
        assert self.in_host or self.interrupts >= rounds // 2

    @property
    def in_host(self) -> bool:
        """Whether its device is one of the host, which has no interrupts."""
        return (self.path.device or "").startswith("host:")


def serve_rounds(here: Here, device: str, rounds: int, busy: bool, pause: float) -> Wakes:
    """Accept one session and play ``rounds`` of a byte there and back; say the port first.

    Each byte is sent ``pause`` seconds after it could be.
    """
    os.environ["IVSMC_SPIN_US"] = "0"
    with ivsmc.create_server(("0.0.0.0", 0), device=device, require="smc") as listener:
        here.send(listener.getsockname()[1])
        session, _ = listener.accept()
    with session:
        return _play(session, rounds, busy, pause, serve=True)


def play_rounds(
    device: str, address: tuple[str, int], rounds: int, busy: bool, pause: float
) -> Wakes:
    """Play with ``serve_rounds``; where ``busy``, neither end ever waits."""
    os.environ["IVSMC_SPIN_US"] = "0"
    with connect(address, device) as session:
        return _play(session, rounds, busy, pause, serve=False)


def _play(session: ivsmc.Session, rounds: int, busy: bool, pause: float, *, serve: bool) -> Wakes:
    def receive() -> None:
        while True:
            with contextlib.suppress(BlockingIOError):
                assert session.recv(1) == b"!"
                return

    session.setblocking(not busy)
    interrupts = before = 0
    for number in range(WARM + rounds):
        if number == WARM:
            before = _interrupts()
        if serve:
            receive()
        if pause:
            time.sleep(pause)
        session.send(b"!")
        if not serve:
            receive()
    interrupts = _interrupts() - before
    stats = {key: value for key, value in session.stats().items() if isinstance(value, int)}
    session.setblocking(True)
    session.shutdown(socket.SHUT_WR)
    assert session.recv(1) == b""
    return Wakes(Path.of(session), interrupts, stats)


def _interrupts() -> int:
    """Interrupts of this machine's devices that are bound to VFIO, so far."""
    lines = pathlib.Path("/proc/interrupts").read_text().splitlines()
    processors = len(lines[0].split())
    return sum(sum(map(int, line.split()[1 : 1 + processors])) for line in lines if "vfio" in line)
