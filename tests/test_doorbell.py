"""Sessions woken by doorbell: who is woken, by what, and what becomes of lost doorbells."""

import asyncio
import contextlib
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

import ivsmc
from blocked import until_blocked
from conftest import REGION_BYTES, running_server
from crowd import PATIENCE
from doorbells import (
    answer,
    answered,
    ask,
    attend,
    eventfds,
    grown,
    holding_connections_of,
    losing_doorbells_to,
    say_when_told,
    warm_up,
)
from endpoints import LOOPBACK, receive_exactly, session_pair
from forking import forked, ignore_threads
from processes import Here, running
from reference_server import running_reference

ROUNDS = 30
ESTABLISHED = 1
"""``TCP_ESTABLISHED`` of the kernel."""


@pytest.fixture(scope="module")
def directory(device_specs: dict[str, str]) -> Path:
    """Where sockets may be, short enough for their names."""
    return Path(device_specs["host"].removeprefix("host:")).parent


@pytest.fixture(params=[1, 4], ids=["one-vector", "four-vectors"], scope="module")
def device(request: pytest.FixtureRequest, directory: Path) -> Iterator[str]:
    """A device of an ivshmem server whose clients have so many vectors each."""
    path = directory / f"vectors-{request.param}.sock"
    with running_server(path, "--vectors", str(request.param)):
        yield f"host:{path}"


def test_a_sleeper_is_woken_by_doorbell_alone(device: str) -> None:
    with answered(device) as (remote, (session,)):
        warm_up(remote, session)
        before = session.stats()
        for _ in range(ROUNDS):
            until_blocked(remote.process.pid)
            ask(session, b"question")
        ours = grown(session, before)
        assert (ours["wakes_sent"], ours["wakes_received"]) == (0, 0)
        assert ours["doorbells_sent"] == ROUNDS
        session.close()
        (theirs,), opened = remote.receive()
        # The first answers may have come before this end had heard a doorbell.
        assert theirs["wakes_sent"] < ROUNDS / 3
        # The end of the connection may have come before the doorbell that said so.
        assert theirs["wakes_received"] <= 1
        assert theirs["doorbells_received"] >= ROUNDS
        assert opened["doorbells_lost"] == 0


def asleep_in_recv(pool: ThreadPoolExecutor, session: ivsmc.Session) -> tuple[Future[bytes], int]:
    """Have a thread of ``pool`` receive a byte; return that byte to come, and the thread's id."""
    thread: Future[int] = Future()

    def receive() -> bytes:
        thread.set_result(threading.get_native_id())
        return session.recv(1)

    received = pool.submit(receive)
    until_blocked(os.getpid(), thread.result())
    return received, thread.result()


def test_both_ends_of_a_sleeping_process_are_woken_by_doorbell(device: str) -> None:
    near, far = session_pair(device)
    with ThreadPoolExecutor(1) as pool, near, far:
        for _ in range(ROUNDS):
            waiting, _ = asleep_in_recv(pool, far)
            near.sendall(b"x")
            assert waiting.result(PATIENCE) == b"x"
        assert far.stats()["wakes_received"] == near.stats()["wakes_sent"] == 0
        assert far.stats()["doorbells_received"] >= ROUNDS


def test_ends_that_never_sleep_send_none(device: str) -> None:
    near, far = session_pair(device)
    with near, far:
        far.setblocking(False)
        before = near.stats(), far.stats()
        for _ in range(1000):
            near.sendall(bytes(1000))
            assert far.recv(1000)
        nothing = dict.fromkeys(grown(near, before[0]), 0)
        assert (grown(near, before[0]), grown(far, before[1])) == (nothing, nothing)


def test_fifty_threads_share_one_doorbell(device: str) -> None:
    """Each sleeps on a session of its own, here and there; each is answered."""
    threads, rounds = 50, 20
    with closing(ivsmc.open_device(device)) as opened:
        with answered(device, threads) as (remote, sessions):

            def talk(session: ivsmc.Session) -> None:
                session.settimeout(PATIENCE)
                for number in range(rounds):
                    ask(session, f"question {number} of {session.getsockname()}".encode())

            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(talk, sessions))
            for session in sessions:
                session.close()
            theirs, there = remote.receive()
        here = opened.stats()
        woken = sum(one["doorbells_received"] for one in theirs)
        assert woken > threads
        # A stalled machine may make the back-stop look just between a bit and its doorbell.
        assert here["doorbells_lost"] + there["doorbells_lost"] <= 1


def test_signals_put_no_attachment_off(directory: Path) -> None:
    """Nor the first client of an ivshmem server, which knows of no vectors of others."""
    path = directory / "signals.sock"
    with (
        running_server(path, "--vectors", "1"),
        running(attach_under_signals, f"host:{path}") as remote,
    ):
        attached = remote.pipe.poll(PATIENCE)
        if not attached:
            remote.kill()
        assert attached, "it hangs"
        assert remote.receive() == "attached"


def attach_under_signals(_here: Here, device: str) -> str:
    """Attach to ``device`` while signals come faster than it ever waits."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)
    ivsmc.open_device(device).close()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return "attached"


def test_a_thread_that_gives_up_leaves_the_doorbell_to_another(device: str) -> None:
    """The one that slept first leads; the other is woken all the same when it has left."""
    near, far = session_pair(device)
    other_near, other_far = session_pair(device)
    with ThreadPoolExecutor(2) as pool, near, far, other_near, other_far:
        for _ in range(5):
            leader, _ = asleep_in_recv(pool, far)
            follower, thread = asleep_in_recv(pool, other_far)
            near.sendall(b"1")
            assert leader.result(PATIENCE) == b"1"
            until_blocked(os.getpid(), thread)
            before = other_far.stats()
            other_near.sendall(b"2")
            assert follower.result(PATIENCE) == b"2"
            assert grown(other_far, before)["doorbells_received"] >= 1
            assert grown(other_far, before)["wakes_received"] == 0


def test_closing_the_leaders_session_leaves_the_doorbell_to_another(device: str) -> None:
    near, far = session_pair(device)
    other_near, other_far = session_pair(device)
    with ThreadPoolExecutor(2) as pool, near, far, other_near, other_far:
        closed, _ = asleep_in_recv(pool, far)
        follower, thread = asleep_in_recv(pool, other_far)
        far.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            closed.result(PATIENCE)
        until_blocked(os.getpid(), thread)
        other_near.sendall(b"x")
        assert follower.result(PATIENCE) == b"x"


def test_a_descriptor_becomes_ready_by_doorbell(device: str) -> None:
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        with running(say_when_told, device, listener.getsockname()) as remote:
            session, _ = listener.accept()
            with session:
                poll = select.poll()
                poll.register(session, select.POLLIN)
                for round_number in range(ROUNDS + 1):
                    if round_number == 1:
                        before = session.stats()
                    remote.send(True)
                    assert poll.poll(PATIENCE * 1000)
                    assert session.recv(10) == b"x"
                    assert not poll.poll(0)
                assert grown(session, before)["wakes_received"] == 0
                assert grown(session, before)["doorbells_received"] >= ROUNDS
                remote.send(False)
                assert remote.receive()["wakes_sent"] <= 1


def test_streams_of_asyncio_are_woken_by_doorbell(device: str) -> None:
    async def talk(session: ivsmc.Session) -> None:
        session.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=session)
        for number in range(ROUNDS):
            question = f"question {number}".encode()
            writer.write(question)
            assert await asyncio.wait_for(reader.readexactly(len(question)), PATIENCE) == question
        assert session.stats()["doorbells_received"] > 0
        writer.close()
        await writer.wait_closed()

    with answered(device) as (remote, (session,)):
        asyncio.run(talk(session))
        (theirs,), _ = remote.receive()
        assert theirs["bytes_sent"] == theirs["bytes_received"] > 0


def test_a_peer_whose_doorbell_is_not_known_is_woken_over_tcp(directory: Path) -> None:
    """A client keeps 256 descriptors of others: an idle one with 255 vectors leaves no room."""
    path = directory / "many-vectors.sock"
    device = f"host:{path}"
    with running_server(path, "--vectors", "255"), running(attend, device) as idle:
        assert idle.receive() == "attached"
        with answered(device) as (remote, (session,)):
            for _ in range(5):
                until_blocked(remote.process.pid)
                ask(session, b"question")
            assert session.stats()["wakes_sent"] >= 5
            assert session.stats()["doorbells_sent"] == 0
        idle.send("leave")


def test_the_back_stop_finds_a_lost_doorbell(device: str) -> None:
    with closing(ivsmc.open_device(device)):
        known = set(eventfds(os.getpid()))
        with answered(device) as (remote, (session,)):
            warm_up(remote, session)
            with losing_doorbells_to(remote.process.pid, known):
                before = session.stats()
                session.settimeout(PATIENCE)
                ask(session, b"into nowhere")
                assert grown(session, before)["doorbells_sent"] >= 1
                until_blocked(remote.process.pid)
                before = session.stats()
                ask(session, b"by another way")
                assert grown(session, before)["wakes_sent"] == 1
            session.close()
            _, opened = remote.receive()
            assert opened["doorbells_lost"] >= 1


def test_a_peer_that_joins_while_no_descriptor_is_left_is_woken_over_tcp(device: str) -> None:
    """And later ones by doorbell: the connection to the ivshmem server goes on."""
    with closing(ivsmc.open_device(device)), running(answer, device, 1) as unheard:
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        address = unheard.receive()  # it has joined
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        with ivsmc.create_connection(address, device=device) as session:
            for _ in range(ROUNDS):
                until_blocked(unheard.process.pid)
                ask(session, b"question")
            assert session.stats()["doorbells_sent"] == 0
            # Another id: of one that was told once nothing is said again.
            with answered(device) as (remote, (heard,)):
                warm_up(remote, heard)
                heard.close()
                remote.receive()
        unheard.receive()


@pytest.mark.parametrize("how", ["recv", "poll"])
def test_the_ivshmem_server_tells_of_a_killed_peer_before_tcp_does(device: str, how: str) -> None:
    with closing(ivsmc.open_device(device)) as opened, answered(device) as (remote, (session,)):
        ask(session, b"question")
        until_blocked(remote.process.pid)
        with holding_connections_of(remote.process.pid) as held:
            assert held >= 1
            if how == "poll":
                poll = select.poll()
                poll.register(session, select.POLLIN)
                remote.kill()
                assert poll.poll(PATIENCE * 1000)
            else:
                remote.kill()
            session.settimeout(PATIENCE)
            with pytest.raises(ConnectionResetError):
                session.recv(1)
            state = session.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            assert isinstance(state, bytes)
            assert state[0] == ESTABLISHED
            assert opened.stats()["departures"] == 1


@ignore_threads
def test_a_fork_takes_nothing_from_who_sleeps(device: str) -> None:
    def in_child() -> int:
        near, far = session_pair(device)
        with near, far:
            near.sendall(b"child")
            assert receive_exactly(far, 5) == b"child"
        return os.getpid()

    with ThreadPoolExecutor(1) as pool, answered(device) as (remote, (session,)):
        warm_up(remote, session)
        inside: list[int] = []
        entered = threading.Event()

        def receive() -> bytes:
            inside.append(threading.get_native_id())
            entered.set()
            return session.recv(1)

        waiting = pool.submit(receive)
        entered.wait()
        until_blocked(os.getpid(), inside[0])
        with forked(in_child) as child:
            assert child.result() != os.getpid()
            # What the other end still sent for the question has come, and has been looked at.
            until_blocked(remote.process.pid)
            until_blocked(os.getpid(), inside[0])
            before = session.stats()
            session.sendall(b"x")
            assert waiting.result(PATIENCE) == b"x"
        assert grown(session, before)["wakes_received"] == 0


def test_sessions_outlive_the_ivshmem_server(directory: Path) -> None:
    path = directory / "ending.sock"
    device = f"host:{path}"
    with contextlib.ExitStack() as stack:
        with running_server(path):
            remote, (session,) = stack.enter_context(answered(device))
            until_blocked(remote.process.pid)
            ask(session, b"question")
        until_blocked(remote.process.pid)
        before = session.stats()
        ask(session, b"another")
        assert grown(session, before)["doorbells_sent"] == 1
        assert grown(session, before)["wakes_sent"] == 0


@pytest.mark.parametrize("vectors", [0, 1, 2])
def test_an_ivshmem_server_that_marks_nobody(directory: Path, vectors: int) -> None:
    with running_reference(directory / "plain.sock", REGION_BYTES, vectors) as (_, device):
        with closing(ivsmc.open_device(device)) as opened:
            assert opened.stats()["vector"] == (None, 0, 1)[vectors]
            with answered(device) as (remote, (session,)):
                until_blocked(remote.process.pid)
                ask(session, b"warm")
                before = session.stats()
                for _ in range(5):
                    until_blocked(remote.process.pid)
                    ask(session, b"question")
                sent = grown(session, before)
                by_doorbell = vectors > 0
                assert sent["doorbells_sent"] == (5 if by_doorbell else 0)
                assert sent["wakes_sent"] == (0 if by_doorbell else 5)
                os.kill(remote.process.pid, signal.SIGKILL)
                with pytest.raises(ConnectionResetError):
                    session.recv(1)
