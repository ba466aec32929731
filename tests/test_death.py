"""A process that is killed: its peers read what it published, its memory comes back."""

import contextlib
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import ivsmc
import victims
from blocked import until_blocked
from endpoints import LOOPBACK, fill, receive_exactly, session_pair
from processes import Remote, running
from random_stream import LARGEST, RandomStream

GENEROUS = 10
"""Seconds every wait ends in; the promise is 2."""
ROUNDS = 30
"""Kills in the middle of setting a session up, at a random moment each."""
TRIES = 10_000
"""Looks at the region, of a millisecond each, until it must be clean."""


@pytest.fixture(params=[False, True], ids=["alone", "forked"])
def forks(request: pytest.FixtureRequest) -> bool:
    """Whether the killed process leaves a child behind, which lives on."""
    return bool(request.param)


@pytest.fixture
def region(shared_device: str) -> Iterator[ivsmc.Device]:
    """The device, held open, with nobody else on it."""
    device = ivsmc.open_device(shared_device)
    with contextlib.closing(device):
        assert_clean(device)
        yield device


def is_clean(device: ivsmc.Device) -> bool:
    """Whether nothing in the region is anybody's but this process's slot and one idle extent."""
    census = device.census()
    return census.pop("extents") <= 1 and census == {
        "live": 1,
        "dead": 0,
        "listeners": 0,
        "intents": 0,
        "dmbs_held": 0,
        "dmbs_attached": 0,
    }


def assert_clean(device: ivsmc.Device) -> None:
    """Wait until the region is clean; nobody tells when."""
    for _ in range(TRIES):
        if is_clean(device):
            return
        time.sleep(0.001)
    raise AssertionError(device.census())


@contextlib.contextmanager
def session_with(
    victim: Callable[..., None], device: str, *arguments: object, buffer: int | None = None
) -> Iterator[tuple[Remote, ivsmc.Session]]:
    """A session with another process that does ``victim``."""
    with ivsmc.create_server(LOOPBACK, device=device, buffer=buffer) as listener:
        address = listener.getsockname()
        with running(victim, device, address, *arguments) as remote:
            session, _ = listener.accept()
            with session:
                assert session.transport == "smc"
                session.settimeout(GENEROUS)
                yield remote, session


class Clock:
    """Says how long it took from a kill to what it led to (``pytest -rP`` shows it).

    No limit is set to that.
    """

    start = 0.0

    def kill(self, remote: Remote) -> None:
        self.start = time.monotonic()
        remote.kill()

    def note(self, what: str) -> None:
        print(f"after {time.monotonic() - self.start:.4f} s: {what}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_killed_in_mid_stream(
    region: ivsmc.Device, shared_device: str, forks: bool, clock: Clock
) -> None:
    with session_with(victims.stream, shared_device, forks) as (remote, session):
        received = receive_exactly(session, 5_000_000)
        session.send(b"!")
        remote.receive()
        clock.kill(remote)
        with pytest.raises(ConnectionResetError):
            while part := session.recv(LARGEST):
                received += part
        clock.note("reset")
        expected = RandomStream(victims.SEED)
        for start in range(0, len(received), LARGEST):
            part = received[start : start + LARGEST]
            assert part == expected.take(len(part)), start
        assert session.recv(1) == b""  # told once, as TCP does
        with pytest.raises(BrokenPipeError):
            session.send(b"?")
    assert_clean(region)
    clock.note("clean")


def test_what_was_published_is_readable(
    region: ivsmc.Device, shared_device: str, forks: bool, clock: Clock
) -> None:
    """Killed while it waits in recv; whoever reads later reads all of it."""
    with session_with(victims.publish_and_receive, shared_device, forks) as (remote, session):
        assert remote.receive() == "published"
        until_blocked(remote.process.pid)
        clock.kill(remote)
        assert receive_exactly(session, victims.PUBLISHED) == RandomStream(victims.SEED).take(
            victims.PUBLISHED
        )
        with pytest.raises(ConnectionResetError):
            session.recv(1)
        clock.note("reset")
    assert_clean(region)
    clock.note("clean")


def test_what_was_ended_properly_is_no_reset(
    region: ivsmc.Device, shared_device: str, forks: bool
) -> None:
    with session_with(victims.publish_and_shut_down, shared_device, forks) as (remote, session):
        assert remote.receive() == "published"
        remote.kill()
        received = receive_exactly(session, victims.PUBLISHED + 1)
        assert received == RandomStream(victims.SEED).take(victims.PUBLISHED)
    assert_clean(region)


def test_killed_while_it_waits_for_room(
    region: ivsmc.Device, shared_device: str, forks: bool, clock: Clock
) -> None:
    with session_with(victims.fill_and_send, shared_device, forks) as (remote, session):
        published = remote.receive()
        until_blocked(remote.process.pid)
        clock.kill(remote)
        assert receive_exactly(session, published) == bytes(published)
        with pytest.raises(ConnectionResetError):
            session.recv(1)
        clock.note("reset")
    assert_clean(region)
    clock.note("clean")


@pytest.mark.parametrize("call", ["recv", "sendall"])
def test_its_death_wakes_who_waits_for_it(
    region: ivsmc.Device, shared_device: str, forks: bool, call: str, clock: Clock
) -> None:
    with session_with(victims.receive_nothing, shared_device, forks) as (remote, session):
        assert remote.receive() == "here"
        if call == "sendall":
            fill(session)
            session.settimeout(GENEROUS)
        argument: Any = 1 if call == "recv" else b"no room"
        inside: list[int] = []

        def wait() -> None:
            inside.append(threading.get_native_id())
            entered.set()
            getattr(session, call)(argument)

        entered = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(wait)
            entered.wait()
            until_blocked(os.getpid(), inside[0])
            clock.kill(remote)
            with pytest.raises(ConnectionResetError):
                waiting.result()
        clock.note("reset")
    assert_clean(region)
    clock.note("clean")


def test_its_death_makes_a_descriptor_ready(
    region: ivsmc.Device, shared_device: str, forks: bool
) -> None:
    with session_with(victims.receive_nothing, shared_device, forks) as (remote, session):
        assert remote.receive() == "here"
        poll = select.poll()
        poll.register(session, select.POLLIN)
        assert not poll.poll(0)
        remote.kill()
        assert poll.poll(GENEROUS * 1000)
        with pytest.raises(ConnectionResetError):
            session.recv(1)
    assert_clean(region)


def test_clients_killed_at_random_moments_of_the_handshake(
    region: ivsmc.Device, shared_device: str
) -> None:
    moments = random.Random(1)
    with ivsmc.create_server(LOOPBACK, device=shared_device) as listener:
        address = listener.getsockname()
        with running(victims.fork_clients, shared_device, address) as remote:
            for _ in range(ROUNDS):
                remote.send(True)
                child = remote.receive()
                listener.settimeout(GENEROUS)
                for _ in range(moments.randrange(1, 20)):
                    listener.accept()[0].close()
                _pass(moments.uniform(0, 0.002))
                os.kill(child, signal.SIGKILL)
                assert remote.receive() == -signal.SIGKILL
                _refuse_what_is_left(listener)
            remote.send(False)
        assert listener.stats()["accepted_smc"] >= ROUNDS
    region.reap()  # of those killed before they were anybody's peer nobody knows
    assert_clean(region)
    _assert_sessions_work(shared_device)


def _pass(seconds: float) -> None:
    """Let time pass, to be at a random moment of what somebody else does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        os.sched_yield()


def _refuse_what_is_left(listener: ivsmc.Listener) -> None:
    """Take the connections that a killed client has left in the queue and in hand."""
    listener.setblocking(False)
    for _ in range(TRIES):
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            if listener.stats()["handshakes"] == 0:
                return
            time.sleep(0.001)
    raise AssertionError(listener.stats())


def _assert_sessions_work(device: str) -> None:
    near, far = session_pair(device)
    with near, far:
        near.sendall(b"works")
        assert receive_exactly(far, 5) == b"works"


def test_servers_killed_at_random_moments_of_the_handshake(
    region: ivsmc.Device, shared_device: str
) -> None:
    moments = random.Random(2)
    transports = []
    with running(victims.fork_servers, shared_device) as remote:
        for _ in range(ROUNDS):
            remote.send(True)
            child, address = remote.receive()
            with _killed_after(child, moments.randrange(1, 20), moments) as connected:
                with pytest.raises(ConnectionRefusedError):
                    while True:
                        with contextlib.suppress(ConnectionResetError):  # while it connected
                            with ivsmc.create_connection(
                                address, GENEROUS, device=shared_device
                            ) as session:
                                transports.append(session.transport)
                        connected.release()
            assert remote.receive() == -signal.SIGKILL
        remote.send(False)
    assert transports.count("smc") >= ROUNDS
    region.reap()
    assert_clean(region)
    _assert_sessions_work(shared_device)


@contextlib.contextmanager
def _killed_after(child: int, count: int, moments: random.Random) -> Iterator[threading.Semaphore]:
    """Kill ``child`` at a random moment after so many releases, or at the end."""
    released = threading.Semaphore(0)

    def kill() -> None:
        for _ in range(count):
            released.acquire()
        _pass(moments.uniform(0, 0.002))
        os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield released
    finally:
        released.release(count)
        killer.join()


def test_killed_in_accept(
    region: ivsmc.Device, shared_device: str, forks: bool, clock: Clock
) -> None:
    """Its child has the listening socket too, so the kernel's queue lives on with it."""
    with running(victims.accept, shared_device, forks) as remote:
        address = remote.receive()
        until_blocked(remote.process.pid)
        assert region.census()["listeners"] == 1
        clock.kill(remote)
        if forks:
            with ivsmc.create_connection(address, GENEROUS, device=shared_device) as session:
                assert session.transport == "tcp"
                assert session.fallback_reason is not None
                # An ivshmem server has perhaps not yet marked it.
                assert session.fallback_reason.name in ("PEER_NO_SMC", "NOT_MATCHED")
        else:
            with pytest.raises(ConnectionRefusedError):
                ivsmc.create_connection(address, GENEROUS, device=shared_device)
        clock.note("answered")
        assert_clean(region)
        clock.note("clean")


def test_killed_with_connections_in_hand(
    region: ivsmc.Device, shared_device: str, forks: bool, clock: Clock
) -> None:
    with running(victims.hold_a_listener, shared_device, forks) as remote:
        address = remote.receive()
        with contextlib.ExitStack() as sessions:
            held = [
                sessions.enter_context(
                    ivsmc.create_connection(address, GENEROUS, device=shared_device)
                )
                for _ in range(5)
            ]
            assert {session.transport for session in held} == {"smc"}
            if forks:
                remote.send("fork")
                assert remote.receive() == "forked"
            clock.kill(remote)
            for session in held:
                with pytest.raises(ConnectionResetError):
                    session.recv(1)
            clock.note("reset")
        assert_clean(region)
        clock.note("clean")


def test_killed_in_connect(region: ivsmc.Device, shared_device: str) -> None:
    """The intent of a connection that is on its way is taken back."""
    with ivsmc.create_server(LOOPBACK, device=shared_device, backlog=0) as listener:
        address = listener.getsockname()
        with contextlib.ExitStack() as queue:
            for _ in range(2):  # as many as a queue of none holds, and one to be dropped
                client = queue.enter_context(socket.socket())
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.connect(address)
            with running(victims.connect_to_nobody, shared_device, address) as remote:
                remote.receive()
                for _ in range(TRIES):
                    if region.census()["intents"] == 1:
                        break
                    time.sleep(0.001)
                until_blocked(remote.process.pid)
                assert region.census()["intents"] == 1
                remote.kill()
            region.reap()
    assert_clean(region)


def test_both_ends_killed(shared_device: str) -> None:
    """Nobody who knew them is left: whoever attaches next cleans up."""
    with running(victims.serve_one, shared_device) as server:
        address = server.receive()
        with running(victims.connect_to_one, shared_device, address) as client:
            assert client.receive() == server.receive() == "smc"
            os.kill(client.process.pid, signal.SIGSTOP)  # it sees nothing of the other's end
            server.kill()
            client.kill()
    with contextlib.closing(ivsmc.open_device(shared_device)) as device:
        assert_clean(device)


def test_an_idle_neighbour_can_ask_for_the_dead(region: ivsmc.Device, shared_device: str) -> None:
    with running(victims.accept, shared_device, False) as remote:
        remote.receive()
        assert region.census()["live"] == 2
        assert region.reap() == 0
        remote.kill()
        assert region.reap() <= 1  # an ivshmem server has been faster perhaps
    assert_clean(region)
