"""Closing: a proper one never looks like a reset, an improper one does; it wakes all inside."""

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import ivsmc
import rounds
import waiters
from blocked import until_blocked
from endpoints import LOOPBACK, Endpoint, fill, receive_all, session_pair
from processes import running

Pair = tuple[Endpoint, Endpoint]
ROUNDS = {"local": 10_000, "file": 1_000, "host": 1_000}


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("spin", ["0", "50"], ids=["asleep", "awake"])
def test_a_proper_close_never_looks_like_a_reset(
    device_specs: dict[str, str], kind: str, spin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wakes the other; where there is no doorbell, by a byte that often nobody reads."""
    monkeypatch.setenv("IVSMC_SPIN_US", spin)
    device, count = device_specs[kind], ROUNDS[kind]
    with running(rounds.serve, device, 1, count) as server:
        address = server.receive()
        with running(rounds.connect, device, address, 1, count) as client:
            transports, client_wakes = client.receive()
        same, server_wakes = server.receive()
    assert transports == same
    assert client_wakes + server_wakes > count / 10
    assert transports.total() == count
    assert transports["smc"] > count * 0.99  # a busy machine misses an intent now and then


def test_done_writing_then_close(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"all")
    near.shutdown(socket.SHUT_WR)
    near.close()
    assert receive_all(far) == b"all"
    assert far.recv(1) == b""


def test_done_writing_then_close_with_data_unread(pair: Pair) -> None:
    """The peer has the end of the stream already: it learns of the reset when it sends."""
    near, far = pair
    far.sendall(b"never read")
    near.sendall(b"all")
    near.shutdown(socket.SHUT_WR)
    assert receive_all(far) == b"all"
    _until_there(near)
    near.close()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        while True:
            far.sendall(b"nobody there")


def test_close_with_data_unread_is_a_reset_after_the_data(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"read this first")
    _until_there(far)
    far.sendall(b"never read")
    _until_there(near)
    near.close()
    assert far.recv(15, socket.MSG_WAITALL) == b"read this first"
    with pytest.raises(ConnectionResetError):
        far.recv(1)


@pytest.mark.parametrize("call", ["MSG_WAITALL", "recvmsg_into"])
def test_a_reset_is_told_after_a_call_that_met_it_and_returned_data(pair: Pair, call: str) -> None:
    """It would be a proper end otherwise."""
    near, far = pair
    near.sendall(b"read this first")
    _until_there(far)
    far.sendall(b"never read")
    _until_there(near)
    near.close()
    if call == "MSG_WAITALL":
        assert far.recv(16, socket.MSG_WAITALL) == b"read this first"
    else:
        assert far.recvmsg_into([bytearray(15), bytearray(1)])[0] == 15
    with pytest.raises(ConnectionResetError):
        far.recv(1)
    assert far.recv(1) == b""


def test_close_with_data_unread_wakes_the_peer(pair: Pair) -> None:
    near, far = pair
    far.sendall(b"never read")
    _until_there(near)
    with _inside(lambda: far.recv(1)) as waiting:
        near.close()
        with pytest.raises(ConnectionResetError):
            waiting.result()


def test_a_peer_without_room_learns_of_the_close(pair: Pair) -> None:
    """Nobody will read what it sends: an error, and no wait for ever."""
    near, far = pair
    fill(far)
    far.setblocking(True)
    with _inside(lambda: far.sendall(bytes(64 << 20))) as waiting:
        near.close()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            waiting.result()


def test_closing_twice_and_from_many_threads(device: str) -> None:
    near, far = session_pair(device)
    near.sendall(b"all")
    with ThreadPoolExecutor(8) as pool:
        for closing in [pool.submit(near.close) for _ in range(8)]:
            closing.result()
    with far:
        assert receive_all(far) == b"all"


def test_both_close_at_once(device: str) -> None:
    for _ in range(200):
        near, far = session_pair(device)
        near.sendall(b"read")
        assert far.recv(4) == b"read"
        both = threading.Barrier(2)

        def close(end: ivsmc.Session, both: threading.Barrier = both) -> None:
            both.wait()
            end.close()

        with ThreadPoolExecutor(2) as pool:
            for closing in [pool.submit(close, end) for end in (near, far)]:
                closing.result()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("call", [*waiters.RECEIVING, *waiters.SENDING])
def test_close_wakes_threads_inside(device: str, call: str, threads: int) -> None:
    near, far = session_pair(device)
    with far:
        if call in waiters.SENDING:
            fill(near)
            near.setblocking(True)
        wait = (waiters.RECEIVING | waiters.SENDING)[call]
        with contextlib.ExitStack() as inside:
            waiting = [inside.enter_context(_inside(lambda: wait(near))) for _ in range(threads)]
            near._close()  # the files made from it keep close() waiting
            for one in waiting:
                with pytest.raises((OSError, ValueError)) as caught:
                    one.result()
                assert getattr(caught.value, "errno", errno.EBADF) == errno.EBADF
        near.close()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("timeout", [None, waiters.LONG])
def test_close_wakes_threads_inside_accept(
    device: str, timeout: float | None, threads: int
) -> None:
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        listener.settimeout(timeout)
        with contextlib.ExitStack() as inside:
            waiting = [inside.enter_context(_inside(listener.accept)) for _ in range(threads)]
            listener.close()
            for one in waiting:
                with pytest.raises(OSError) as caught:
                    one.result()
                assert caught.value.errno == errno.EBADF


def test_close_in_the_middle_of_traffic(device: str) -> None:
    """Threads send and receive at full speed; each ends with an error, none crashes or hangs."""
    for _ in range(20):
        near, far = session_pair(device)
        moved = threading.Semaphore(0)

        def send(end: ivsmc.Session, moved: threading.Semaphore = moved) -> None:
            while True:
                end.sendall(bytes(300_000))
                moved.release()

        def receive(end: ivsmc.Session) -> None:
            buffer = bytearray(300_000)
            while end.recv_into(buffer):
                pass
            raise EOFError

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(send, end) for end in (near, far)]
            running += [pool.submit(receive, end) for end in (near, far)]
            for _ in range(10):
                moved.acquire()
            near.close()
            for one in running:
                with pytest.raises((OSError, EOFError)):
                    one.result()
        far.close()


def _until_there(end: Endpoint) -> None:
    end.recv(1, socket.MSG_PEEK)


@contextlib.contextmanager
def _inside(call: Callable[[], Any]) -> Iterator["Future[Any]"]:
    """Run ``call`` in a thread of its own, which sleeps in it."""
    started: Future[int] = Future()

    def run() -> Any:
        started.set_result(threading.get_native_id())
        return call()

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(run)
        until_blocked(os.getpid(), started.result())
        yield waiting
