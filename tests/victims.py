"""What processes do until they are killed."""

import os
import threading
import warnings
from collections.abc import Callable
from typing import NoReturn

import ivsmc
from endpoints import LOOPBACK, fill, receive_exactly
from processes import Here
from random_stream import LARGEST, RandomStream

SEED = 17
PUBLISHED = 100_000
"""Bytes published before the end, less than fit into a ring."""


def fork_a_child(here: Here) -> None:
    """Leave a child that sleeps on a pipe, until the test closes its end of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since 3.12: threads are running
        child = os.fork()
    if child == 0:
        try:
            here.receive()
        finally:
            os._exit(0)


def sleep_for_ever() -> NoReturn:
    while True:
        threading.Event().wait()


def _connected(
    here: Here, device: str, address: tuple[str, int], forks: bool, buffer: int | None = None
) -> ivsmc.Session:
    session = ivsmc.create_connection(address, device=device, buffer=buffer)
    assert session.transport == "smc", session.fallback_reason
    if forks:
        fork_a_child(here)
    return session


def stream(here: Here, device: str, address: tuple[str, int], forks: bool) -> None:
    """Send a stream without end; fork in the middle of it."""
    session = _connected(here, device, address, forks=False)
    data = RandomStream(SEED)

    def send() -> None:
        while True:
            session.sendall(data.take(data.piece_size(LARGEST)))

    threading.Thread(target=send, daemon=True).start()
    receive_exactly(session, 1)  # the test has read a good part of it
    if forks:
        fork_a_child(here)
    here.send("streaming")
    sleep_for_ever()


def publish_and_receive(here: Here, device: str, address: tuple[str, int], forks: bool) -> None:
    """Publish ``PUBLISHED`` bytes, then wait for some."""
    session = _connected(here, device, address, forks)
    session.sendall(RandomStream(SEED).take(PUBLISHED))
    here.send("published")
    session.recv(1)


def publish_and_shut_down(here: Here, device: str, address: tuple[str, int], forks: bool) -> None:
    """Publish ``PUBLISHED`` bytes, end the stream, and live on."""
    session = _connected(here, device, address, forks)
    session.sendall(RandomStream(SEED).take(PUBLISHED))
    session.shutdown(2)
    here.send("published")
    sleep_for_ever()


def fill_and_send(here: Here, device: str, address: tuple[str, int], forks: bool) -> None:
    """Fill the ring, say with how many zeros, then wait for room."""
    session = _connected(here, device, address, forks)
    here.send(fill(session))
    session.setblocking(True)
    session.sendall(bytes(1))


def receive_nothing(here: Here, device: str, address: tuple[str, int], forks: bool) -> None:
    """Neither send nor receive."""
    _session = _connected(here, device, address, forks, buffer=1 << 14)
    here.send("here")
    sleep_for_ever()


def accept(here: Here, device: str, forks: bool) -> None:
    """Wait in ``accept``."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        if forks:
            fork_a_child(here)
        here.send(listener.getsockname())
        listener.accept()


def hold_a_listener(here: Here, device: str, forks: bool) -> None:
    """Take connections in the background, accept none."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        listener.fileno()
        here.send(listener.getsockname())
        if forks:
            here.receive()  # connections are in hand
            fork_a_child(here)
            here.send("forked")
        sleep_for_ever()


def connect_to_nobody(here: Here, device: str, address: tuple[str, int]) -> None:
    """Wait in ``connect``: the queue of ``address`` is full."""
    here.send("connecting")
    ivsmc.create_connection(address, device=device)


def serve_one(here: Here, device: str) -> None:
    """Accept a session and send it a stream without end."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        here.send(listener.getsockname())
        session, _ = listener.accept()
    _stream_both_ways(here, session)


def connect_to_one(here: Here, device: str, address: tuple[str, int]) -> None:
    """Connect and send a stream without end."""
    _stream_both_ways(here, ivsmc.create_connection(address, device=device))


def _stream_both_ways(here: Here, session: ivsmc.Session) -> None:
    def send() -> None:
        while True:
            session.sendall(bytes(LARGEST))

    threading.Thread(target=send, daemon=True).start()
    receive_exactly(session, 1 << 20)
    here.send(session.transport)
    while True:
        session.recv(LARGEST)


def fork_clients(here: Here, device: str, address: tuple[str, int]) -> None:
    """For each word of the test fork a child that connects again and again, until it is killed."""

    def connect() -> None:
        here.send(os.getpid())
        while True:
            ivsmc.create_connection(address, device=device).close()

    _fork_children(here, connect)


def fork_servers(here: Here, device: str) -> None:
    """For each word of the test fork a child that listens and accepts, until it is killed."""

    def serve() -> None:
        listener = ivsmc.create_server(LOOPBACK, device=device)
        here.send((os.getpid(), listener.getsockname()))
        while True:
            session, _ = listener.accept()
            session.close()

    _fork_children(here, serve)


def _fork_children(here: Here, run: Callable[[], None]) -> None:
    while here.receive():
        child = os.fork()  # nothing of ivsmc is open here, and no other thread runs
        if child == 0:
            try:
                run()
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        here.send(os.waitstatus_to_exitcode(status))
