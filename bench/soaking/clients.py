"""The kinds of load: each a process that connects for a while when it is told to."""

import asyncio
import contextlib
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ivsmc
import ivsmc.asyncio
from soaking.members import Tally, Weight
from soaking.streams import ECHO, HEADER, STREAM, Wrong, exchange, receive_exactly

Address = tuple[str, int]
_LARGEST_STREAM = 1 << 25
_LARGEST_MESSAGE = 1 << 16
_SMALL = 64
"""Bytes of the message whose round trip is measured: ``ivsmc bench`` takes as many."""
_TASKS = 20


@dataclass(frozen=True)
class Order:
    """Work for so many seconds, as the seed says."""

    seconds: float
    seed: int


Load = Callable[[Address, str, random.Random, "Until", Tally], None]


class Until:
    """Whether there is time left for more."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __bool__(self) -> bool:
        return time.monotonic() < self._end


@contextlib.contextmanager
def client(
    load: Load, address: Address, device: str
) -> Iterator[Callable[[Order], tuple[Tally, Weight]]]:
    """Attach, and carry ``load`` as often as ordered."""

    def work(order: Order) -> tuple[Tally, Weight]:
        tally = Tally()
        load(address, device, random.Random(order.seed), Until(order.seconds), tally)
        return tally, Weight.now()

    # Streams over TCP leave no region to be attached to.
    with contextlib.ExitStack() as stack:
        if device != "none":
            stack.enter_context(ivsmc.open_device(device))
        yield work


def _connect(
    address: Address, device: str, tally: Tally, what: bytes, *numbers: int
) -> ivsmc.Session:
    session = ivsmc.create_connection(address, device=device)
    tally.sessions += 1
    tally.shared += session.transport == "smc"
    session.sendall(HEADER.pack(what, *(*numbers, 0, 0)[:2]))
    return session


def streams(address: Address, device: str, rng: random.Random, until: Until, tally: Tally) -> None:
    """Long streams, both ways at once."""
    while until:
        seed = rng.getrandbits(60)
        total = int(2 ** rng.uniform(0, _LARGEST_STREAM.bit_length() - 1))
        with _connect(address, device, tally, STREAM, seed, total) as session:
            exchange(session, seed, seed + 1, total)
        tally.bytes += total


def questions(
    address: Address, device: str, rng: random.Random, until: Until, tally: Tally
) -> None:
    """Messages of all sizes on one session, and the time that small ones take."""
    with _connect(address, device, tally, ECHO) as session:
        while until:
            for _ in range(50):
                _ask(session.recv, session.sendall, rng, _SMALL, tally)
            for _ in range(5):
                size = int(2 ** rng.uniform(0, _LARGEST_MESSAGE.bit_length() - 1))
                _ask(session.recv, session.sendall, rng, size)


def questions_over_tcp(
    address: Address, _device: str, rng: random.Random, until: Until, tally: Tally
) -> None:
    """Ask the same listener on a plain socket: what the machine itself does meanwhile."""
    with socket.create_connection(address) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.sendall(HEADER.pack(ECHO, 0, 0))
        tally.sessions += 1
        while until:
            for _ in range(50):
                _ask(plain.recv, plain.sendall, rng, _SMALL, tally)


def _ask(
    recv: Callable[[int], bytes],
    send: Callable[[bytes], None],
    rng: random.Random,
    size: int,
    tally: Tally | None = None,
) -> None:
    message = rng.randbytes(size)
    begin = time.perf_counter()
    send(message)
    answer = receive_exactly(recv, size)
    if tally is not None:
        tally.round_trips.append(time.perf_counter() - begin)
        tally.bytes += size
    if answer != message:
        raise Wrong(f"an echo of {size} bytes is not the message")


def visits(address: Address, device: str, rng: random.Random, until: Until, tally: Tally) -> None:
    """Sessions of one message each; some leave without having listened to the answer."""
    while until:
        size = int(2 ** rng.uniform(0, _LARGEST_MESSAGE.bit_length() - 1))
        with _connect(address, device, tally, ECHO) as session:
            message = rng.randbytes(size)
            session.sendall(message)
            session.shutdown(socket.SHUT_WR)
            if receive_exactly(session.recv, size + 1) != message:
                raise Wrong(f"an echo of {size} bytes is not the message")
        tally.bytes += size


def tasks(address: Address, device: str, rng: random.Random, until: Until, tally: Tally) -> None:
    """Sessions of asyncio, many at once."""

    async def one(seed: int) -> None:
        own = random.Random(seed)
        session = await ivsmc.asyncio.connect(*address, device=device)
        tally.sessions += 1
        tally.shared += session.transport == "smc"
        reader, writer = await asyncio.open_connection(sock=session)
        writer.write(HEADER.pack(ECHO, 0, 0))
        for _ in range(own.randrange(1, 20)):
            size = int(2 ** own.uniform(0, _LARGEST_MESSAGE.bit_length() - 1))
            message = own.randbytes(size)
            writer.write(message)
            if await reader.readexactly(size) != message:
                raise Wrong(f"an echo of {size} bytes is not the message")
            tally.bytes += size
        writer.write_eof()
        if await reader.read():
            raise Wrong("more came back than was sent")
        writer.close()
        await writer.wait_closed()

    async def all_of_them() -> None:
        while until:
            async with asyncio.TaskGroup() as group:
                for _ in range(_TASKS):
                    group.create_task(one(rng.getrandbits(60)))

    asyncio.run(all_of_them())


_kept: list[object] = []


def mistaken(
    address: Address, device: str, rng: random.Random, _until: Until, tally: Tally
) -> None:
    """Expect another stream than comes, for a run that must find it."""
    seed = rng.getrandbits(60)
    with _connect(address, device, tally, STREAM, seed, _LARGEST_MESSAGE) as session:
        exchange(session, seed, seed + 2, _LARGEST_MESSAGE)


def hoarding_descriptors(
    address: Address, device: str, rng: random.Random, until: Until, tally: Tally
) -> None:
    """Keep descriptors, for a run that must find it."""
    visits(address, device, rng, until, tally)
    _kept.extend(os.dup(1) for _ in range(10))


def hoarding_memory(
    address: Address, device: str, rng: random.Random, until: Until, tally: Tally
) -> None:
    """Keep memory, for a run that must find it."""
    visits(address, device, rng, until, tally)
    _kept.append(rng.randbytes(5 << 20))
