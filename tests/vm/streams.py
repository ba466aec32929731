"""Streams between machines: of fixed length, many at once, or going on until told to end."""

import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ivsmc
from endpoints import receive_exactly
from processes import Here
from random_stream import LARGEST, RandomStream, exchange
from vm.talks import Path, connect

ANYWHERE = ("0.0.0.0", 0)
SEEDS = (23, 24)
"""Of the streams to the connecting end and from it."""
STEADY = 1 << 20
"""Bytes after whose arrival a stream is in full flow."""


def accept_one(here: Here, device: str | None) -> ivsmc.Session:
    """Say the port, and accept one session."""
    with ivsmc.create_server(ANYWHERE, device=device, require="smc") as listener:
        here.send(listener.getsockname()[1])
        session, _ = listener.accept()
    return session


def accept_and_exchange(here: Here, device: str | None, total: int) -> Path:
    """Exchange ``total`` bytes each way, at once, with who connects."""
    with accept_one(here, device) as session:
        exchange(session, SEEDS[0], SEEDS[1], total)
        return Path.of(session)


def connect_and_exchange(device: str | None, address: tuple[str, int], total: int) -> Path:
    """Exchange ``total`` bytes each way with ``accept_and_exchange``."""
    with connect(address, device) as session:
        exchange(session, SEEDS[1], SEEDS[0], total)
        return Path.of(session)


def accept_many(here: Here, device: str, count: int, size: int) -> None:
    """Hold ``count`` sessions open at once; answer each with what it sends."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(ivsmc.create_server(ANYWHERE, device=device, require="smc"))
        here.send(listener.getsockname()[1])
        sessions = [held.enter_context(listener.accept()[0]) for _ in range(count)]

        def answer(session: ivsmc.Session) -> None:
            while data := session.recv(size):
                session.sendall(data)

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(answer, sessions))


def connect_many(device: str, address: tuple[str, int], count: int, size: int) -> set[Path]:
    """Open ``count`` sessions; use all at once, each with ``size`` bytes of its own, checked."""
    with contextlib.ExitStack() as held:
        sessions = [held.enter_context(connect(address, device)) for _ in range(count)]

        def use(number: int) -> Path:
            session = sessions[number]
            data = RandomStream(number).take(size)
            for start in range(0, size, 4096):
                part = data[start : start + 4096]
                session.sendall(part)
                assert receive_exactly(session, len(part)) == part
            session.shutdown(socket.SHUT_WR)
            assert session.recv(1) == b""
            return Path.of(session)

        with ThreadPoolExecutor(count) as pool:
            return set(pool.map(use, range(count)))


@dataclass(frozen=True)
class Flow:
    """What one end says of a stream that went on until it was told to end, or was ended."""

    path: Path
    peer: str
    """Slot of the other end: its number and its generation."""
    sent: int
    received: int
    ends: tuple[str, str]
    """How sending and receiving ended: "done", or an exception's name."""


def serve_flows(here: Here, device: str, count: int) -> list[Flow]:
    """Accept ``count`` sessions; stream both ways with each from its beginning until told."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(ivsmc.create_server(ANYWHERE, device=device, require="smc"))
        here.send(listener.getsockname()[1])
        told = threading.Event()
        pool = held.enter_context(ThreadPoolExecutor(count))
        held.callback(told.set)
        flows = []
        for _ in range(count):
            session = held.enter_context(listener.accept()[0])
            flows.append(pool.submit(_flow, session, SEEDS, told))
        here.receive()
        told.set()
        return [flow.result() for flow in flows]


def connect_flow(here: Here, device: str, address: tuple[str, int]) -> Flow:
    """Stream both ways with ``serve_flows``, until told; say when it flows, and when it ended."""
    with connect(address, device) as session:
        told, flows = threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            flow = pool.submit(_flow, session, (SEEDS[1], SEEDS[0]), told, flows)
            flow.add_done_callback(lambda _: flows.set())
            flows.wait()
            here.send("flows")
            threading.Thread(target=_when_told, args=(here, told), daemon=True).start()
            return flow.result()


def _when_told(here: Here, told: threading.Event) -> None:
    with contextlib.suppress(EOFError, OSError):
        here.receive()
    told.set()


def _flow(
    session: ivsmc.Session,
    seeds: tuple[int, int],
    told: threading.Event,
    flows: threading.Event | None = None,
) -> Flow:
    outgoing, incoming = map(RandomStream, seeds)

    def send() -> None:
        while not told.is_set():
            outgoing.take(session.send(outgoing.peek(outgoing.piece_size(LARGEST))))
        session.shutdown(socket.SHUT_WR)

    def receive() -> None:
        while data := session.recv(LARGEST):
            assert data == incoming.take(len(data)), "wrong bytes"
            if flows and incoming.position >= STEADY:
                flows.set()

    def ending(act: Callable[[], None]) -> str:
        try:
            act()
        except OSError as error:
            return type(error).__name__
        return "done"

    with ThreadPoolExecutor(2) as pool:
        ends = pool.submit(ending, send), pool.submit(ending, receive)
        how = ends[0].result(), ends[1].result()
    peer = str(session.stats()["peer"])
    return Flow(Path.of(session), peer, outgoing.position, incoming.position, how)


def vectors(device: str) -> list[int | None]:
    """Those on which other processes of this machine are notified."""
    with ivsmc.open_device(device) as attachment:
        slots = attachment.slots()
    return sorted(slot["vector"] for slot in slots if slot["same_boot"] and not slot["own"])


def slots_at(device: str, address: str) -> set[str]:
    """The slots of processes on the host or guest that has this address."""
    with ivsmc.open_device(device) as attachment:
        return {slot["slot"] for slot in attachment.slots() if address in slot["addresses"]}


def census(device: str) -> dict[str, int]:
    """What is in use in the region, after taking back what dead peers had."""
    with ivsmc.open_device(device) as attachment:
        attachment.reap()
        return attachment.census()


def memory_type(device: str) -> str | None:
    """What the memory of a guest's device was measured to be."""
    with ivsmc.open_device(device) as attachment:
        found: str | None = attachment.stats()["memory"]
    return found


def found() -> list[str]:
    """The devices that a process uses which names none."""
    return [device["spec"] for device in ivsmc.devices() if device["usable"]]
