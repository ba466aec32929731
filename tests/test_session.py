"""What a session has beyond a socket, and what it refuses by name."""

import errno
import signal
import socket
import threading
import time
import warnings
import weakref
from typing import Any

import pytest

import ivsmc
from endpoints import LOOPBACK, receive_exactly, session_pair


def test_it_says_which_way_it_went(shared_device: str) -> None:
    near, far = session_pair(shared_device)
    with near, far:
        for end in (near, far):
            assert end.transport == "smc"
            assert end.fallback_reason is None
            assert repr(end).startswith("<ivsmc.Session transport='smc', laddr=('127.0.0.1', ")


def test_it_says_why_it_went_over_tcp() -> None:
    near, far = session_pair("none")
    with near, far:
        reason = near.fallback_reason
        assert isinstance(reason, ivsmc.FallbackReason)
        assert (reason.name, reason.side) == ("DISABLED", "local")
        assert reason.code == 0x03000000
        assert reason.sentence
        assert str(reason).startswith("DISABLED (0x03000000, local side): ")
        assert "fallback_reason=DISABLED" in repr(near)


def test_counters_count(device: str) -> None:
    near, far = session_pair(device)
    with near, far:
        near.sendall(bytes(1000))
        assert len(receive_exactly(far, 1000)) == 1000
        assert near.stats()["bytes_sent"] == far.stats()["bytes_received"] == 1000
        assert near.stats()["bytes_received"] == far.stats()["bytes_sent"] == 0
        assert near.stats()["transport"] == near.transport


@pytest.mark.parametrize(
    ("asked", "given"), [(1, 16 << 10), (20_000, 32 << 10), (1 << 20, 1 << 20)]
)
def test_the_buffer_is_the_size_asked_for(shared_device: str, asked: int, given: int) -> None:
    near, far = session_pair(shared_device, buffer=asked)
    with near, far:
        assert near.stats()["receive_buffer"] == far.stats()["send_buffer"] == given


@pytest.mark.parametrize("buffer", [-1, 0])
def test_a_buffer_of_no_size_is_refused(buffer: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        ivsmc.create_server(LOOPBACK, buffer=buffer)
    with socket.create_server(LOOPBACK) as listener:
        with pytest.raises((ValueError, OverflowError)):
            ivsmc.create_connection(listener.getsockname(), buffer=buffer)


def test_what_a_session_cannot_do_is_refused_by_name(device: str) -> None:
    near, far = session_pair(device)
    refused: list[tuple[str, Any]] = [
        ("detach", near.detach),
        ("dup", near.dup),
        ("MSG_OOB", lambda: near.send(b"!", socket.MSG_OOB)),
        ("MSG_OOB", lambda: near.sendall(b"!", socket.MSG_OOB)),
        ("MSG_OOB", lambda: near.recv(1, socket.MSG_OOB)),
        ("MSG_OOB", lambda: near.recv_into(bytearray(1), 1, socket.MSG_OOB)),
        ("ancillary", lambda: near.sendmsg([b"x"], [(socket.SOL_SOCKET, 1, b"1234")])),
    ]
    with near, far:
        for name, call in refused:
            with pytest.raises(OSError, match=name) as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP


def test_close_wakes_a_thread_inside_recv(device: str) -> None:
    near, far = session_pair(device)
    with near, far:
        caught: list[OSError] = []
        inside = threading.Event()

        def receive() -> None:
            inside.set()
            try:
                near.recv(1)
            except OSError as error:
                caught.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        inside.wait()
        near.close()
        thread.join()
        assert [error.errno for error in caught] == [errno.EBADF]
        assert far.recv(1) == b""


def test_one_that_gives_up_waiting_leaves_the_others_their_wake_up(device: str) -> None:
    near, far = session_pair(device)
    with near, far:
        received: list[bytes] = []
        patient = threading.Thread(target=lambda: received.append(near.recv(1)))
        patient.start()
        time.sleep(0.1)
        near.settimeout(0.1)
        with pytest.raises(TimeoutError):
            near.recv(1)
        far.sendall(b"x")
        patient.join(5)
        late = patient.is_alive()
        if late:
            near.close()
            patient.join()
        assert received == [b"x"]
        assert not late


def test_what_a_signal_handler_raises_is_not_lost_between_two_buffers(device: str) -> None:
    class Raised(Exception):
        pass

    def handler(_signal: int, _frame: object) -> None:
        raise Raised

    near, far = session_pair(device)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with near, far:
            far.sendall(b"full")
            near.settimeout(10)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Raised):
                near.recvmsg_into([bytearray(4), bytearray(4)], 0, socket.MSG_WAITALL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_left_open_it_warns_and_closes(device: str) -> None:
    near, far = session_pair(device)
    with far:
        gone = weakref.ref(near)
        with pytest.warns(ResourceWarning, match="unclosed <ivsmc.Session transport="):
            del near
        assert gone() is None
        assert far.recv(1) == b""


def test_closed_it_does_not_warn(device: str) -> None:
    near, far = session_pair(device)
    near.close()
    far.close()
    assert near.closed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del near, far


def test_its_descriptor_is_no_way_around_it(shared_device: str) -> None:
    near, far = session_pair(shared_device)
    with near, far:
        near.sendall(b"through the session")
        assert far.fileno() != near.fileno()
        assert receive_exactly(far, 19) == b"through the session"


def test_it_is_made_from_nothing_else() -> None:
    with pytest.raises(TypeError):
        ivsmc.Session(3)  # type: ignore[arg-type]
