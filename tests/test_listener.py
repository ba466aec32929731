"""``create_server`` and its listener: the standard library's, with adoption of descriptors."""

import contextlib
import errno
import os
import select
import selectors
import socket
import threading
from collections.abc import Iterator

import pytest

import ivsmc
from endpoints import LOOPBACK, receive_all


@pytest.fixture
def listener(device: str) -> Iterator[ivsmc.Listener]:
    with ivsmc.create_server(LOOPBACK, device=device) as made:
        yield made


def test_connect_then_accept_in_one_thread(listener: ivsmc.Listener, device: str) -> None:
    with contextlib.ExitStack() as ends:
        nears = [
            ends.enter_context(ivsmc.create_connection(listener.getsockname(), device=device))
            for _ in range(10)
        ]
        fars = [listener.accept() for _ in nears]
        for far, address in fars:
            ends.enter_context(far)
            assert address == far.getpeername()
        assert {address for _, address in fars} == {near.getsockname() for near in nears}


def test_accept_waits(listener: ivsmc.Listener, device: str) -> None:
    connected: list[ivsmc.Session] = []
    address = listener.getsockname()
    client = threading.Thread(
        target=lambda: connected.append(ivsmc.create_connection(address, device=device))
    )
    client.start()
    far, _ = listener.accept()
    client.join()
    with far, connected[0] as near:
        assert near.transport == far.transport == ("tcp" if device == "none" else "smc")


def test_a_backlog_of_one_leaves_connections_to_nobody_else(device: str) -> None:
    """Only where others accept from the same socket are these given time to do so."""
    half_of_it_is_less_than_theirs = 0.15
    for _ in range(10):  # a loaded machine may be late
        with ivsmc.create_server(LOOPBACK, backlog=1, device=device) as listener:
            listener.fileno()
            near = ivsmc.create_connection(
                listener.getsockname(), half_of_it_is_less_than_theirs, device=device
            )
            with near, listener.accept()[0]:
                transport = near.transport
        if transport == "smc" or device == "none":
            return
    raise AssertionError(transport)


def test_accept_times_out_and_does_not_wait(listener: ivsmc.Listener) -> None:
    listener.settimeout(0.01)
    with pytest.raises(TimeoutError, match="timed out"):
        listener.accept()
    listener.setblocking(False)
    assert not listener.getblocking()
    with pytest.raises(BlockingIOError):
        listener.accept()
    with pytest.raises(ValueError):
        listener.settimeout(-1)
    with pytest.raises(TypeError):
        listener.settimeout("1")  # type: ignore[arg-type]
    listener.setblocking(True)
    assert listener.gettimeout() is None


def test_an_accepted_session_blocks_whatever_the_listener_does(
    listener: ivsmc.Listener, device: str
) -> None:
    listener.settimeout(60)
    with ivsmc.create_connection(listener.getsockname(), device=device):
        far, _ = listener.accept()
        with far:
            assert far.gettimeout() is None


def test_it_is_readable_while_a_client_waits(listener: ivsmc.Listener, device: str) -> None:
    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        assert not selector.select(0)
        with ivsmc.create_connection(listener.getsockname(), device=device):
            assert selector.select()
            listener.accept()[0].close()
        assert not selector.select(0)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_close_wakes_a_thread_inside_accept(listener: ivsmc.Listener) -> None:
    caught: list[OSError] = []
    inside = threading.Event()

    def accept() -> None:
        inside.set()
        try:
            listener.accept()
        except OSError as error:
            caught.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    inside.wait()
    listener.close()
    thread.join()
    assert [error.errno for error in caught] == [errno.EBADF]


def test_closed_it_refuses(listener: ivsmc.Listener) -> None:
    address = listener.getsockname()
    listener.close()
    listener.close()
    assert listener.closed
    assert listener.fileno() == -1
    assert repr(listener) == "<ivsmc.Listener [closed]>"
    for function in (listener.accept, listener.getsockname):
        with pytest.raises(OSError) as caught:
            function()
        assert caught.value.errno == errno.EBADF
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_sessions_outlive_their_listener(listener: ivsmc.Listener, device: str) -> None:
    with ivsmc.create_connection(listener.getsockname(), device=device) as near:
        far, _ = listener.accept()
        listener.close()
        with far:
            far.sendall(b"still here")
        assert receive_all(near) == b"still here"


def test_the_session_of_an_event_loop_does_not_get_its_listeners_descriptor(device: str) -> None:
    """``sock_accept`` of asyncio removes the listener's number from its loop once more later."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(ivsmc.create_server(LOOPBACK, device=device))
        listener.setblocking(False)
        number = listener.fileno()
        near = ivsmc.create_connection(listener.getsockname(), device=device)
        opened.enter_context(near)
        select.select([listener], [], [])
        far = opened.enter_context(listener.accept()[0])
        listener.close()
        # Of all that are free, it is the lowest.
        while (lower := os.open(os.devnull, os.O_RDONLY)) < number:
            opened.callback(os.close, lower)
        os.close(lower)
        assert lower == number
        assert far.fileno() != number


def test_left_open_it_warns(device: str) -> None:
    listener = ivsmc.create_server(LOOPBACK, device=device)
    address = listener.getsockname()
    with pytest.warns(ResourceWarning, match="unclosed <ivsmc.Listener laddr="):
        del listener
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


def test_a_client_that_nobody_accepted_is_reset(listener: ivsmc.Listener, device: str) -> None:
    with ivsmc.create_connection(listener.getsockname(), device=device) as near:
        listener.close()
        with pytest.raises(ConnectionResetError):
            near.recv(1)


def test_options_and_kind(listener: ivsmc.Listener) -> None:
    assert listener.family is socket.AF_INET
    assert listener.type is socket.SOCK_STREAM
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    listener.listen(5)
    assert repr(listener) == f"<ivsmc.Listener laddr={listener.getsockname()!r}>"


def test_a_port_in_use_is_named() -> None:
    with ivsmc.create_server(LOOPBACK) as listener:
        address = listener.getsockname()
        with pytest.raises(
            OSError, match=f"attempting to bind on address .*{address[1]}"
        ) as caught:
            ivsmc.create_server(address)
        assert caught.value.errno == errno.EADDRINUSE


def test_reuse_port_shares_the_port(device: str) -> None:
    with ivsmc.create_server(LOOPBACK, reuse_port=True, device=device) as first:
        address = first.getsockname()
        with ivsmc.create_server(address, reuse_port=True, device=device) as second:
            assert second.getsockname() == address


def test_adopting_a_listening_socket(device: str) -> None:
    sock = socket.create_server(LOOPBACK)
    address = sock.getsockname()
    with ivsmc.create_server(fd=sock.detach(), device=device) as listener:
        assert listener.getsockname() == address
        with ivsmc.create_connection(address, device=device) as near:
            far, _ = listener.accept()
            with far:
                assert near.transport == far.transport == ("tcp" if device == "none" else "smc")


def test_what_cannot_be_adopted_stays_the_callers() -> None:
    with socket.socket() as connecting, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(b"\0ivsmc-test-adoption")
        unix.listen()
        for sock in (connecting, unix):
            with pytest.raises(ValueError, match=f"fd {sock.fileno()} is not a listening TCP"):
                ivsmc.create_server(fd=sock.fileno())
            sock.getsockname()
        with pytest.raises(ValueError, match="not both"):
            ivsmc.create_server(LOOPBACK, fd=connecting.fileno())
    with pytest.raises(TypeError, match="address or fd"):
        ivsmc.create_server()
    with pytest.raises(OSError) as caught:
        ivsmc.create_server(fd=1023)
    assert caught.value.errno == errno.EBADF
