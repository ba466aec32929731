"""What the other processes do in the tests of rates, scale and idleness."""

import gc
import os
import random
import re
import resource
import select
import selectors
import signal
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

import ivsmc
from endpoints import LOOPBACK, Endpoint, receive_all, receive_exactly, session_pair
from ivsmc import _native
from listening import question
from processes import Here, running

SMALL = 16 * 1024
"""The smallest buffer of a session, in bytes."""
SPARE = 1000
"""Descriptors for what is no session."""
MESSAGE = 4096
"""Bytes on each of many sessions at once, each way: less than a buffer, so one thread can do it."""
PATIENCE = 60.0
"""Seconds until a test gives up what should come at once."""


@dataclass
class Holdings:
    """The descriptors of a process, and how many threads and mappings of regions it has."""

    descriptors: Counter[str]
    threads: int
    mappings: int

    def grown_since(self, before: "Holdings") -> Counter[str]:
        """What there is more of, by kind. Which socket it is does not matter: one is replaced."""
        grown = self._by_kind()
        grown.subtract(before._by_kind())
        return +grown

    def _by_kind(self) -> Counter[str]:
        kinds = Counter(threads=self.threads, mappings=self.mappings)
        for name, count in self.descriptors.items():
            # Which socket or pipe it is says its number, what an anonymous inode is its name.
            kinds[re.sub(r":\[\d+\]", "", name)] += count
        return kinds

    @classmethod
    def now(cls) -> "Holdings":
        maps = Path("/proc/self/maps").read_text().splitlines()
        names = []
        for entry in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # the one that lists them
                names.append(str(entry.readlink()))
        return cls(
            descriptors=Counter(names),
            threads=len(list(Path("/proc/self/task").iterdir())),
            mappings=sum("region" in line or "memfd:" in line for line in maps),
        )


@dataclass
class Weight:
    """What a process holds, and the bytes of its memory that are no file's."""

    holdings: Holdings
    private: int

    @classmethod
    def now(cls) -> "Weight":
        gc.collect()
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return cls(Holdings.now(), 1024 * int(line.split()[1]))
        raise AssertionError("the kernel does not say")


def allow_descriptors(count: int) -> None:
    """Raise the soft limit of open descriptors to ``count`` if it is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        assert hard == resource.RLIM_INFINITY or hard >= count, f"only {hard} descriptors"
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def serve_until_told(here: Here, device: str | None, cpu: int | None) -> None:
    """Accept connections and close each when its client did, until as many were as one says.

    That one may overtake some that still shake hands.  The listener is a plain one if there is no
    ``device``.  Says where it listens, and at last how many sessions there were over each
    transport.
    """
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    listener: ivsmc.Listener | socket.socket
    if device is None:
        listener = socket.create_server(LOOPBACK, backlog=4096)
    else:
        listener = ivsmc.create_server(LOOPBACK, backlog=4096, device=device, buffer=SMALL)
    transports: Counter[str] = Counter()
    with listener:
        here.send(listener.getsockname())
        told = 0
        while transports.total() != told or not told:
            conn: Endpoint
            conn, _ = listener.accept()
            with conn:
                told = int(receive_all(conn) or told)
                transports[getattr(conn, "transport", "tcp")] += 1
            if told:
                listener.settimeout(PATIENCE)
    here.send(transports)


def warm_up(session: ivsmc.Session) -> None:
    """Sleep on it, while nothing comes: a process keeps what it needs for that."""
    # A wait whose time is over before it sleeps needs nothing.
    for timeout in (0.001, 0.01, 0.1):
        session.settimeout(timeout)
        with pytest.raises(TimeoutError):
            session.recv(1)
    assert session.stats()["sleeps"]
    session.settimeout(None)


def warm_up_alone(device: str) -> None:
    """The same with a session of this process to itself."""
    near, far = session_pair(device)
    with near, far:
        warm_up(near)


def answer_all(here: Here, device: str, count: int) -> None:
    """Accept ``count`` sessions, and as often as told return on each what came in reverse.

    At the end its holdings, before and after.
    """
    allow_descriptors(count + SPARE)
    with (
        ivsmc.open_device(device),
        ivsmc.create_server(LOOPBACK, backlog=count, device=device, buffer=SMALL) as listener,
    ):
        here.send(listener.getsockname())
        with listener.accept()[0] as first:
            warm_up(first)
            here.send("warm")
            assert receive_all(first) == b""
        before = Holdings.now()
        with ExitStack() as opened:
            sessions = [opened.enter_context(listener.accept()[0]) for _ in range(count)]
            here.send({session.transport for session in sessions})
            while size := here.receive():
                for session in sessions:
                    session.sendall(receive_exactly(session, size)[::-1])
        del sessions, session
        here.send((before, Holdings.now()))
        here.receive()


def weigh_when_asked(here: Here, device: str) -> None:
    """Echo on one session after the other; on one that asks, say what this process weighs."""
    with ivsmc.create_server(LOOPBACK, device=device, buffer=SMALL) as listener:
        warm_up_alone(device)
        here.send(listener.getsockname())
        text = b""
        while text != b"stop":
            session, _ = listener.accept()
            with session:
                text = session.recv(MESSAGE)
                if text not in {b"weigh", b"stop"}:
                    session.sendall(text)
                assert receive_all(session) == b""
            if text == b"weigh":
                here.send(Weight.now())


def breed(here: Here, device: str, address: tuple[str, int], count: int) -> None:
    """Fork ``count`` processes that connect, and have each exchange a message when told.

    At the end every other one is killed. Says each time how many are well.
    """
    pipes: dict[int, socket.socket] = {}
    try:
        for number in range(count):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                try:
                    _one_of_many(theirs, device, address, number)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            theirs.close()
            pipes[pid] = ours
            # One by one: nobody has to wait for the listener longer than a handshake may take.
            assert ours.recv(1) == b"."
        here.send(count)
        while here.receive():
            for pipe in pipes.values():
                pipe.sendall(b"!")
            here.send(sum(pipe.recv(1) == b"." for pipe in pipes.values()))
    finally:
        for number, (pid, pipe) in enumerate(pipes.items()):
            if number % 2:
                os.kill(pid, signal.SIGKILL)
            pipe.shutdown(socket.SHUT_WR)
            os.waitpid(pid, 0)
            pipe.close()


def _one_of_many(pipe: socket.socket, device: str, address: tuple[str, int], number: int) -> None:
    with ivsmc.create_connection(address, device=device, buffer=SMALL) as session:
        assert session.transport == "smc", session.fallback_reason
        pipe.sendall(b".")
        random_bytes = random.Random(number).randbytes
        while pipe.recv(1):
            message = random_bytes(MESSAGE)
            session.sendall(message)
            assert receive_exactly(session, MESSAGE) == message[::-1]
            pipe.sendall(b".")


def cpu_while_idle(seconds: float) -> float:
    """CPU seconds this process uses in ``seconds`` in which it does nothing."""
    before = time.process_time()
    select.select([], [], [], seconds)
    return time.process_time() - before


@contextmanager
def waiting(
    listener: ivsmc.Listener, session: ivsmc.Session, *watched: ivsmc.Listener | ivsmc.Session
) -> Iterator[list[str]]:
    """Have threads wait in ``accept``, in ``recv`` and for what is ``watched`` to be readable.

    Yields what waits no longer.
    """
    ended: list[str] = []

    def accept() -> None:
        with suppress(OSError):
            listener.accept()
        ended.append("accept")

    def receive() -> None:
        with suppress(OSError):
            session.recv(1)
        ended.append("recv")

    stop, stopped = socket.socketpair()

    def watch() -> None:
        select.select([stopped, *watched], [], [])
        ended.append("select")

    threads = [threading.Thread(target=target) for target in (accept, receive, watch)]
    for thread in threads:
        thread.start()
    try:
        yield ended
    finally:
        listener.close()
        session.close()
        stop.close()
        for thread in threads:
            thread.join()
        stopped.close()


def hold_idle(here: Here, device: str, listeners: int, sessions: int, seconds: float) -> None:
    """Listen, accept sessions, wait on some of both, and say what CPU time that takes."""
    allow_descriptors(4 * (listeners + sessions))
    with ExitStack() as opened:
        held = [
            opened.enter_context(
                ivsmc.create_server(LOOPBACK, backlog=sessions, device=device, buffer=SMALL)
            )
            for _ in range(listeners)
        ]
        here.send(held[0].getsockname())
        ends = [opened.enter_context(held[0].accept()[0]) for _ in range(sessions)]
        here.send({end.transport for end in ends})
        # Not in the order in which they were connected, perhaps.
        with selectors.DefaultSelector() as selector:
            for end in ends:
                selector.register(end, selectors.EVENT_READ)
            for _ in ends:
                (key, _), *_ = selector.select()
                end = cast(ivsmc.Session, key.fileobj)
                end.sendall(end.recv(1))
        with waiting(held[1], ends[0], held[2], ends[1]) as ended:
            here.receive()
            used = cpu_while_idle(seconds)
            assert ended == []
            here.send(used)
            here.receive()


def answer_questions(here: Here, device: str, count: int | None) -> None:
    """Echo what comes on each of ``count`` sessions, or until what comes is ``b"stop"``."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        here.send(listener.getsockname())
        while count is None or count > 0:
            session, _ = listener.accept()
            with session:
                text = receive_all(session)
                session.sendall(text)
            if text == b"stop":
                break
            count = count and count - 1


def ask(address: tuple[str, int], device: str) -> None:
    """Connect to an echo server and have it answer."""
    with ivsmc.create_connection(address, device=device) as session:
        assert question(session) == b"question"


def observe(here: Here, device: str) -> None:
    """Be attached to ``device``, and say whenever asked what is in use in its region.

    The dead are taken care of before. What closed a moment ago is given back in the background:
    it is looked until nothing changes.
    """
    with ivsmc.open_device(device) as opened:
        while here.receive():
            last = None
            while last != (last := (opened.reap(), opened.census())):
                select.select([], [], [], 0.1)
            here.send(opened.census())


@contextmanager
def observer(device: str) -> Iterator[Callable[[], dict[str, int]]]:
    """A process that looks on: yields what asks it, after this process has left the region."""

    def census() -> dict[str, int]:
        assert _native.shutdown()
        remote.send(True)
        found: dict[str, int] = remote.receive()
        return found

    with running(observe, device) as remote:
        yield census
        remote.send(False)
        remote.receive()
