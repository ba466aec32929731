"""What ``ivsmc bench`` measures: two processes, one stream, messages there and back.

The measuring process holds one end, another process the other (``Other``): one of its own making
per transport (``Peer``), which gets its commands through a pipe, or one started by hand
(``between``). The measured bytes go through the stream alone. Every transport
gets the same calls: blocking ``sendall`` and ``recv_into``, no timeout, TCP_NODELAY where it is
TCP. What arrives is compared: every round trip byte for byte, every block of the timed stream by
the number at both of its ends, and a separate untimed pass by CRC-32 over all of it.
"""

import contextlib
import multiprocessing
import os
import random
import secrets
import signal
import socket
import struct
import time
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeAlias

import ivsmc

__all__ = [
    "COMMANDS",
    "TRANSPORTS",
    "MismatchError",
    "Other",
    "Peer",
    "Plan",
    "Stream",
    "check",
    "cores",
    "no_delay",
    "round_trips",
    "throughput",
]

Stream: TypeAlias = ivsmc.Session | socket.socket

TRANSPORTS = ("ivsmc", "tcp", "unix")
"""ivsmc on its device, TCP on the loopback interface, an AF_UNIX stream socket."""

_SEED = 20220720
_MESSAGES = 256
"""Different messages in the round trips."""
_STAMP = struct.Struct("<Q")
_DONE = b"\x06"


@dataclass(frozen=True)
class Plan:
    """What to move."""

    message: int
    """Bytes of a round trip's message."""
    round_trips: int
    """Measured round trips per round; a tenth of that runs before, unmeasured."""
    block: int
    """Bytes of a block of the stream, at least 16."""
    stream_bytes: int
    """Bytes of the timed stream per round, a multiple of ``block``."""
    checked_bytes: int
    """Bytes of the stream that is checked by CRC-32."""


class MismatchError(OSError):
    """What arrived is not what was sent."""


def cores() -> tuple[int, int] | None:
    """Return two processors to pin the two processes to; None if there is only one."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else None


class Other(Protocol):
    """The other end of a stream, and the way to tell it what to do."""

    stream: Stream
    """This end."""

    def ask(self, name: str, *numbers: int) -> None:
        """Have it carry out one of ``COMMANDS``; what is sent after this is for the command."""

    def answer(self) -> Any:
        """Return the result of the command, or raise what went wrong over there."""


class Peer:
    """The process at the other end of a stream of one transport."""

    def __init__(
        self, transport: str, core: int | None, device: str | None, require: str | None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_peer_main, args=(theirs, transport, core, device, require), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            address = self.answer()
            self.stream = _connected(transport, address, device, require)
        except BaseException:
            self._process.terminate()  # it may wait for a connection that never comes
            self._end()
            raise

    def ask(self, name: str, *numbers: int) -> None:
        """Start a command over there; return when it is about to touch the stream."""
        with contextlib.suppress(BrokenPipeError):  # the answer says why
            self._pipe.send((name, *numbers))
        self.answer()

    def answer(self) -> Any:
        """Return the result of the command, or raise what went wrong over there."""
        try:
            result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise ConnectionError(
                f"the other process of the bench has ended (status {self._process.exitcode})"
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        """Close the stream and end the process."""
        self.stream.close()
        self._end()

    def _end(self) -> None:
        self._pipe.close()  # ends the process: its next command is the end of the pipe
        self._process.join()
        self._process.close()


def round_trips(peer: Other, plan: Plan) -> "array[int]":
    """Return the nanoseconds of each round trip."""
    rng = random.Random(_SEED)
    messages = [rng.randbytes(plan.message) for _ in range(_MESSAGES)]
    warm_up = plan.round_trips // 10
    samples = array("q", bytes(8 * plan.round_trips))
    buffer = bytearray(plan.message)
    sendall, recv_into, now = peer.stream.sendall, peer.stream.recv_into, time.perf_counter_ns
    peer.ask("echo", warm_up + plan.round_trips, plan.message)
    for trip in range(-warm_up, plan.round_trips):
        message = messages[trip % _MESSAGES]
        start = now()
        sendall(message)
        received = recv_into(buffer)
        if received < plan.message:
            _receive_rest(peer.stream, buffer, received)
        end = now()
        if buffer != message:
            raise MismatchError(f"round trip {trip}: the echo is not the message")
        if trip >= 0:
            samples[trip] = end - start
    peer.answer()
    return samples


def throughput(peer: Other, plan: Plan) -> float:
    """Return bytes per second of a stream of blocks, until the last one was received."""
    blocks = plan.stream_bytes // plan.block
    block = bytearray(random.Random(_SEED).randbytes(plan.block))
    sendall, pack_into, tail = peer.stream.sendall, _STAMP.pack_into, plan.block - _STAMP.size
    peer.ask("sink", blocks, plan.block)
    start = time.perf_counter()
    for number in range(blocks):
        pack_into(block, 0, number)
        pack_into(block, tail, number)
        sendall(block)
    done = peer.stream.recv(1)
    end = time.perf_counter()
    if peer.answer() != blocks or done != _DONE:
        raise MismatchError("the stream was not received whole and in order")
    return blocks * plan.block / (end - start)


def check(peer: Other, plan: Plan) -> int:
    """Send a pseudo-random stream in random pieces; return the bytes whose CRC-32 agreed."""
    rng = random.Random(_SEED)
    sent, crc = 0, 0
    peer.ask("crc", plan.checked_bytes)
    while sent < plan.checked_bytes:
        piece = rng.randbytes(min(rng.randint(1, 2 * plan.block), plan.checked_bytes - sent))
        peer.stream.sendall(piece)
        sent, crc = sent + len(piece), zlib.crc32(piece, crc)
    if peer.answer() != crc:
        raise MismatchError(f"CRC-32 of {sent} bytes differs at the two ends")
    return sent


def _peer_main(
    pipe: Connection, transport: str, core: int | None, device: str | None, require: str | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the measuring process ends this one
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        with contextlib.suppress(EOFError), _accepted(pipe, transport, device, require) as stream:
            while True:
                name, *arguments = pipe.recv()
                pipe.send("ready")
                pipe.send(COMMANDS[name](stream, *arguments))
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):  # the measuring process went first
            pipe.send(error)


def _echo(stream: Stream, count: int, size: int) -> int:
    buffer = bytearray(size)
    sendall, recv_into = stream.sendall, stream.recv_into
    for _ in range(count):
        received = recv_into(buffer)
        if received < size:
            _receive_rest(stream, buffer, received)
        sendall(buffer)
    return count


def _sink(stream: Stream, blocks: int, size: int) -> int:
    if size < 2 * _STAMP.size:
        raise ConnectionError(f"blocks of {size} bytes have no room for their numbers")
    buffer = bytearray(size)
    recv_into, unpack_from, tail = stream.recv_into, _STAMP.unpack_from, size - _STAMP.size
    good = 0
    for number in range(blocks):
        received = recv_into(buffer, 0, socket.MSG_WAITALL)
        if received < size:
            _receive_rest(stream, buffer, received)
        good += unpack_from(buffer, 0) == unpack_from(buffer, tail) == (number,)
    stream.sendall(_DONE)
    return good


def _crc(stream: Stream, total: int) -> int:
    buffer = memoryview(bytearray(64 * 1024))
    crc = 0
    while total:
        received = stream.recv_into(buffer[: min(len(buffer), total)])
        if not received:
            raise ConnectionError("the stream ended early")
        crc = zlib.crc32(buffer[:received], crc)
        total -= received
    return crc


COMMANDS: dict[str, Callable[..., int]] = {"echo": _echo, "sink": _sink, "crc": _crc}
"""What the other end does: each gets the stream and numbers, and returns a number."""


def _receive_rest(stream: Stream, buffer: bytearray, received: int) -> None:
    with memoryview(buffer) as view:
        while received < len(view):
            more = stream.recv_into(view[received:])
            if not more:
                raise ConnectionError("the stream ended early")
            received += more


@contextlib.contextmanager
def _accepted(
    pipe: Connection, transport: str, device: str | None, require: Any
) -> Iterator[Stream]:
    listener: ivsmc.Listener | socket.socket
    if transport == "ivsmc":
        listener = ivsmc.create_server(("127.0.0.1", 0), device=device, require=require)
    elif transport == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0ivsmc-bench-{secrets.token_hex(16)}")
        listener.listen(1)
    with listener:
        pipe.send(listener.getsockname())
        stream, _ = listener.accept()
    with stream:
        no_delay(stream)
        yield stream


def _connected(transport: str, address: Any, device: str | None, require: Any) -> Stream:
    stream: Stream
    if transport == "ivsmc":
        stream = ivsmc.create_connection(address, device=device, require=require)
    elif transport == "tcp":
        stream = socket.create_connection(address)
    else:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(address)
    no_delay(stream)
    return stream


def no_delay(stream: Stream) -> None:
    """Have TCP send at once, where ``stream`` is on TCP."""
    if stream.family != socket.AF_UNIX:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
