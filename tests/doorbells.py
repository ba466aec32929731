"""What the doorbell tests look at and meddle with, and what their other processes do."""

import ctypes
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import ivsmc
from blocked import until_blocked
from endpoints import LOOPBACK, receive_exactly
from processes import Here, Remote, running

PIDFD_GETFD = 438
"""Its number on every architecture."""


def answer(here: Here, device: str, count: int, threads: bool = True) -> None:
    """Accept ``count`` sessions, send back what comes, each in a thread of its own.

    At the end the counters of the sessions and of the device.
    """
    with (
        closing(ivsmc.open_device(device)) as opened,
        ivsmc.create_server(LOOPBACK, backlog=count, device=device) as listener,
    ):
        here.send(listener.getsockname())
        with ExitStack() as sessions:
            accepted = [sessions.enter_context(listener.accept()[0]) for _ in range(count)]
            if threads:
                workers = [threading.Thread(target=_echo, args=(one,)) for one in accepted]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
            else:
                (session,) = accepted
                _echo(session)
            here.send(([session.stats() for session in accepted], opened.stats()))


def _echo(session: ivsmc.Session) -> None:
    while data := session.recv(65536):
        session.sendall(data)


def say_when_told(here: Here, device: str, address: tuple[str, int]) -> None:
    """Connect, and send a byte as often as told."""
    with ivsmc.create_connection(address, device=device) as session:
        assert session.transport == "smc"
        while here.receive():
            session.sendall(b"x")
        here.send(session.stats())


def attend(here: Here, device: str) -> None:
    """Be attached to ``device`` until told."""
    with closing(ivsmc.open_device(device)):
        here.send("attached")
        here.receive()


@contextmanager
def answered(device: str, count: int = 1) -> Iterator[tuple[Remote, list[ivsmc.Session]]]:
    """Sessions that another process answers; its result comes once they are closed."""
    with running(answer, device, count, count > 1) as remote, ExitStack() as stack:
        address = remote.receive()
        sessions = [
            stack.enter_context(ivsmc.create_connection(address, device=device))
            for _ in range(count)
        ]
        assert {session.transport for session in sessions} == {"smc"}
        yield remote, sessions


def ask(session: ivsmc.Session, question: bytes) -> None:
    """Send ``question`` and see it come back."""
    session.sendall(question)
    assert receive_exactly(session, len(question)) == question


def grown(session: ivsmc.Session, before: dict[str, Any]) -> dict[str, int]:
    """What of the ways to wake has been used since ``before``."""
    after = session.stats()
    names = ("wakes_sent", "wakes_received", "doorbells_sent", "doorbells_received")
    return {name: after[name] - before[name] for name in names}


def warm_up(remote: Remote, session: ivsmc.Session) -> None:
    """Ask until answers come by doorbell alone, and nothing sent over TCP before is under way.

    A byte to wake may lie on the connection while the doorbell sent along as a test wakes; it is
    read when this end sleeps again. So one round by doorbell proves nothing; three in a row do.
    """
    by_doorbell = 0
    for _ in range(1000):
        before = session.stats()
        until_blocked(remote.process.pid)
        ask(session, b"warm")
        until_blocked(remote.process.pid)
        ways = grown(session, before)
        if ways["wakes_sent"] + ways["wakes_received"]:
            by_doorbell = 0
        # Nor does a round in which this end did not sleep at all.
        elif ways["doorbells_received"]:
            by_doorbell += 1
        if by_doorbell == 3:
            return
    raise AssertionError(ways)


def eventfds(pid: int) -> dict[int, list[int]]:
    """The eventfds of a process: by the kernel's number, the descriptors."""
    found: dict[int, list[int]] = {}
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        with suppress(FileNotFoundError):  # the one that lists them
            for line in entry.read_text().splitlines():
                if line.startswith("eventfd-id:"):
                    found.setdefault(int(line.split()[1]), []).append(int(entry.name))
    return found


@contextmanager
def losing_doorbells_to(pid: int, known: set[int]) -> Iterator[None]:
    """Doorbells of this process to eventfds of ``pid``, but for the ``known``, go nowhere."""
    theirs = eventfds(pid).keys() - known
    targets = [
        fd for number, fds in eventfds(os.getpid()).items() if number in theirs for fd in fds
    ]
    assert targets
    nowhere = os.eventfd(0)
    for target in targets:
        os.dup2(nowhere, target, inheritable=False)
    os.close(nowhere)
    yield


@contextmanager
def holding_connections_of(pid: int) -> Iterator[int]:
    """Keep the TCP connections of the process ``pid`` open beyond its end; yield how many."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    process = os.pidfd_open(pid)
    with ExitStack() as stack:
        stack.callback(os.close, process)
        count = 0
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not str(entry.readlink()).startswith("socket:"):
                continue
            copy = syscall(PIDFD_GETFD, process, int(entry.name), 0)
            assert copy >= 0, os.strerror(ctypes.get_errno())
            one = stack.enter_context(socket.socket(fileno=copy))
            if one.family == socket.AF_UNIX:
                one.close()  # its end is what tells the ivshmem server
            else:
                count += 1
        yield count
