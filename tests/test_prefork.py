"""Servers of several processes on one port: each connection is served, by whoever is free."""

import os
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

import ivsmc
from crowd import SMALL, observer
from endpoints import LOOPBACK, Endpoint, receive_all, receive_exactly
from forking import forked, ignore_threads
from processes import Here, Remote, running

pytestmark = ignore_threads

WORKERS = 3
CONNECTIONS = 300
STOP = b"stop"
PATIENCE = 60.0
"""Seconds after which a client that is not served fails instead of waiting for ever."""


def work(listener: ivsmc.Listener) -> Counter[str]:
    """Answer one client after the other with who answers and over what, until one says stop."""
    transports: Counter[str] = Counter()
    request = b""
    while request != STOP:
        session, _ = listener.accept()
        with session:
            request = receive_exactly(session, len(STOP))
            if request == STOP:
                listener.close()  # before the client goes on to the next worker
            session.sendall(f"{os.getpid()} {session.transport}".encode())
            transports[session.transport] += 1
    return transports


def work_on_own(address: tuple[str, int], device: str, ready: int) -> Counter[str]:
    """Listen on the port of all workers, then ``work``."""
    with ivsmc.create_server(address, reuse_port=True, device=device, buffer=SMALL) as listener:
        os.write(ready, b"x")
        return work(listener)


def inherited(here: Here, device: str) -> None:
    """A master that listens and never accepts; its forked workers accept from its listener."""
    with ExitStack() as opened:
        listener = opened.enter_context(ivsmc.create_server(LOOPBACK, device=device, buffer=SMALL))
        children = [opened.enter_context(forked(work, listener)) for _ in range(WORKERS)]
        here.send(listener.getsockname())
        here.send([child.result() for child in children])


def adopted(here: Here, device: str) -> None:
    """As ``inherited``, of a plain listening socket that each worker makes a listener."""

    def adopt(descriptor: int) -> Counter[str]:
        with ivsmc.create_server(fd=descriptor, device=device, buffer=SMALL) as listener:
            return work(listener)

    with socket.create_server(LOOPBACK) as listening, ExitStack() as opened:
        children = [opened.enter_context(forked(adopt, listening.fileno())) for _ in range(WORKERS)]
        here.send(listening.getsockname())
        here.send([child.result() for child in children])


def reused(here: Here, device: str) -> None:
    """A master that only keeps the port; each worker listens there."""
    ready, made = os.pipe()
    with socket.socket() as keeper, ExitStack() as opened:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        keeper.bind(LOOPBACK)
        address = keeper.getsockname()
        children = [
            opened.enter_context(forked(work_on_own, address, device, made)) for _ in range(WORKERS)
        ]
        for _ in children:
            os.read(ready, 1)
        here.send(address)
        here.send([child.result() for child in children])


class Service:
    """A master and its workers, from outside."""

    def __init__(self, remote: Remote, device: str) -> None:
        self._remote = remote
        self._device = device
        self.address: tuple[str, int] = remote.receive()

    def connect(self) -> ivsmc.Session:
        return ivsmc.create_connection(
            self.address, timeout=PATIENCE, device=self._device, buffer=SMALL
        )

    def answer(self, conn: Endpoint, request: bytes = b"work") -> tuple[str, str]:
        """Who answers the request, and over what."""
        with conn:
            conn.sendall(request)
            who, transport = receive_all(conn).decode().split()
            assert transport == getattr(conn, "transport", "tcp")
            return who, transport

    def stop(self) -> list[Counter[str]]:
        """Have every worker end; return how many sessions each had over each transport."""
        for _ in range(WORKERS):
            self.answer(self.connect(), STOP)
        served: list[Counter[str]] = self._remote.receive()
        self._remote.receive()  # the master ended well
        return served


@contextmanager
def service(master: object, device: str) -> Iterator[Service]:
    with running(master, device) as remote:  # type: ignore[arg-type]
        yield Service(remote, device)


masters = pytest.mark.parametrize("master", [inherited, adopted, reused])


@masters
def test_every_connection_is_served(shared_device: str, master: object) -> None:
    with observer(shared_device) as census:
        before = census()
        with service(master, shared_device) as workers:

            def ask(number: int) -> tuple[str, str]:
                is_plain = number % 10 == 0
                return workers.answer(
                    socket.create_connection(workers.address, PATIENCE)
                    if is_plain
                    else workers.connect()
                )

            with ThreadPoolExecutor(8) as clients:
                answers = list(clients.map(ask, range(CONNECTIONS)))
            served = workers.stop()
        by_transport = Counter(transport for _, transport in answers)
        by_worker = Counter(who for who, _ in answers)
        assert len(by_worker) <= WORKERS
        assert sum(by_worker.values()) == CONNECTIONS
        # On a busy machine that is not all: who met only busy workers for a quarter of a second
        # has plain TCP, and for ten seconds who comes after two of them.
        assert by_transport["smc"] > 0
        # Those that told the workers to stop are in there as well.
        assert sum(served, Counter()).total() == CONNECTIONS + WORKERS
        assert census() == before


@pytest.mark.parametrize("master", [inherited, adopted])
def test_who_is_busy_keeps_no_connection_from_who_is_not(
    shared_device: str, master: object
) -> None:
    with service(master, shared_device) as workers:
        seen: set[str] = set()
        while len(seen) < WORKERS:  # all of them have begun to accept
            seen.add(workers.answer(workers.connect())[0])
        # Each keeps a worker busy until it is asked.
        conns = [workers.connect() for _ in range(WORKERS)]
        answers = [workers.answer(conn) for conn in reversed(conns)]
        assert len({who for who, _ in answers}) == WORKERS
        workers.stop()
