"""Each method does on a session what it does on a socket: every test runs on both."""

import array
import errno
import math
import os
import signal
import socket
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from endpoints import Endpoint, fill, receive_all, receive_exactly

Pair = tuple[Endpoint, Endpoint]
RESET_OR_PIPE = (BrokenPipeError, ConnectionResetError)


def assert_errno(expected: int, function: Any, *arguments: Any) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == expected


@pytest.mark.parametrize(
    "data",
    [b"bytes", bytearray(b"bytearray"), memoryview(b"view"), array.array("i", [1, -1]), b""],
    ids=lambda data: type(data).__name__,
)
def test_send_takes_every_contiguous_buffer(pair: Pair, data: Any) -> None:
    near, far = pair
    expected = bytes(data)
    assert near.send(data) == len(expected)
    near.sendall(data)
    assert near.sendmsg([data, data]) == 2 * len(expected)
    assert near.sendto(data, ("192.0.2.1", 9)) == len(expected)
    assert near.sendto(data, 0, ("192.0.2.1", 9)) == len(expected)
    near.shutdown(socket.SHUT_WR)
    assert receive_all(far) == expected * 6


def test_what_is_no_buffer_is_refused(pair: Pair) -> None:
    near, _ = pair
    for send in (near.send, near.sendall):
        with pytest.raises(TypeError):
            send("text")  # type: ignore[arg-type]
        with pytest.raises(BufferError):
            send(memoryview(b"abcd")[::2])
    with pytest.raises(TypeError):
        near.sendmsg(b"not buffers")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        near.recv_into(b"read only")
    with pytest.raises(TypeError):
        near.sendto(b"no address")  # type: ignore[call-overload]


def test_recv_of_nothing_and_of_less_than_nothing(pair: Pair) -> None:
    near, _ = pair
    assert near.recv(0) == b""
    assert near.recv_into(bytearray()) == 0
    with pytest.raises(ValueError, match="negative"):
        near.recv(-1)
    with pytest.raises(ValueError, match="negative"):
        near.recv_into(bytearray(4), -1)
    with pytest.raises(ValueError, match="buffer too small"):
        near.recv_into(bytearray(4), 5)


def test_recv_takes_what_is_there(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"0123456789")
    assert far.recv(4) == b"0123"
    assert far.recv(65536) == b"456789"


def test_recv_into_and_the_shapes_with_addresses(pair: Pair) -> None:
    near, far = pair
    buffer = bytearray(b"........")
    near.sendall(b"abc")
    assert far.recv_into(buffer) == 3
    assert buffer == b"abc....."
    near.sendall(b"defgh")
    assert far.recv_into(buffer, 2) == 2
    assert far.recv_into(memoryview(buffer)[6:], 0, socket.MSG_PEEK) == 2
    assert buffer == b"dec...fg"
    assert far.recvfrom(1) == (b"f", None)
    assert far.recvfrom_into(buffer, 1) == (1, None)
    assert far.recvmsg(8) == (b"h", [], 0, None)
    assert buffer == b"gec...fg"


def test_messages_scatter_and_gather(pair: Pair) -> None:
    near, far = pair
    assert near.sendmsg([b"one", b"", bytearray(b"two"), memoryview(b"three")]) == 11
    first, none, second = bytearray(4), bytearray(), bytearray(4)
    assert far.recvmsg_into([first, none, second]) == (8, [], 0, None)
    assert first + second == b"onetwoth"
    assert far.recvmsg_into([first, second], 0, socket.MSG_PEEK) == (3, [], 0, None)
    assert far.recv(8) == b"ree"
    with pytest.raises(ValueError):
        far.recvmsg(-1)


def test_peek_leaves_the_data(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"peek")
    assert far.recv(2, socket.MSG_PEEK) == b"pe"
    assert far.recv(9, socket.MSG_PEEK) == b"peek"
    assert far.recv(9) == b"peek"
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1, socket.MSG_PEEK) == b""


def test_waitall_gathers_and_ends_with_the_stream(pair: Pair) -> None:
    near, far = pair
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(far.recv, 600_000, socket.MSG_WAITALL)
        for _ in range(6):
            near.sendall(bytes(100_000))
        assert len(gathered.result()) == 600_000
    near.sendall(b"rest")
    near.shutdown(socket.SHUT_WR)
    buffer = bytearray(16)
    assert far.recv_into(buffer, 0, socket.MSG_WAITALL) == 4
    assert far.recv(16, socket.MSG_WAITALL) == b""


def test_dontwait_does_not_wait_on_a_blocking_end(pair: Pair) -> None:
    near, far = pair
    with pytest.raises(BlockingIOError):
        far.recv(1, socket.MSG_DONTWAIT)
    near.sendall(b"x")
    assert receive_exactly(far, 1) == b"x"
    assert near.send(b"y", socket.MSG_DONTWAIT) == 1


def test_shutdown_of_one_direction(pair: Pair) -> None:
    near, far = pair
    near.sendall(b"last")
    near.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenPipeError):
        near.send(b"more")
    with pytest.raises(BrokenPipeError):
        near.sendall(b"more")
    assert receive_all(far) == b"last"
    assert far.recv(1) == b""
    far.sendall(b"the other direction goes on")
    far.shutdown(socket.SHUT_WR)
    assert receive_all(near) == b"the other direction goes on"


def test_shutdown_of_reading(pair: Pair) -> None:
    near, _ = pair
    near.shutdown(socket.SHUT_RD)
    assert near.recv(1) == b""


def test_shutdown_of_both_directions(pair: Pair) -> None:
    near, far = pair
    near.shutdown(socket.SHUT_RDWR)
    assert far.recv(1) == b""
    assert near.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        near.send(b"x")
    assert_errno(errno.EINVAL, far.shutdown, 17)


def test_what_was_sent_before_close_arrives(pair: Pair) -> None:
    near, far = pair
    near.sendall(bytes(range(256)) * 64)
    near.close()
    assert receive_all(far) == bytes(range(256)) * 64
    assert far.recv(1) == b""


def test_close_with_unread_data_is_a_reset(pair: Pair) -> None:
    near, far = pair
    far.sendall(b"never read")
    assert receive_exactly(near, 5) == b"never"
    near.close()
    with pytest.raises(ConnectionResetError):
        far.recv(1)


def test_sending_to_a_closed_peer_ends_in_an_error(pair: Pair) -> None:
    near, far = pair
    near.close()
    with pytest.raises(RESET_OR_PIPE):
        while True:
            far.send(b"is anybody there?")
    with pytest.raises(RESET_OR_PIPE):
        far.sendall(b"again")


def test_a_closed_end_refuses_everything(pair: Pair) -> None:
    near, _ = pair
    near.close()
    near.close()
    assert near.fileno() == -1
    for function, *arguments in (
        (near.recv, 1),
        (near.recv_into, bytearray(1)),
        (near.recvmsg, 1),
        (near.recvmsg_into, [bytearray(1)]),
        (near.send, b"x"),
        (near.sendall, b"x"),
        (near.sendmsg, [b"x"]),
        (near.shutdown, socket.SHUT_RDWR),
        (near.getpeername,),
        (near.getsockname,),
        (near.getsockopt, socket.SOL_SOCKET, socket.SO_ERROR),
        (near.setsockopt, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ):
        assert_errno(errno.EBADF, function, *arguments)
    assert "[closed]" in repr(near)


def test_leaving_the_context_closes(pair: Pair) -> None:
    near, far = pair
    with near as entered:
        assert entered is near
    assert near.fileno() == -1
    assert far.recv(1) == b""


def test_timeouts_are_kept_and_checked(pair: Pair) -> None:
    near, _ = pair
    assert (near.gettimeout(), near.getblocking(), near.timeout) == (None, True, None)
    near.settimeout(2)
    assert (near.gettimeout(), near.getblocking(), near.timeout) == (2.0, True, 2.0)
    near.settimeout(0)
    assert (near.gettimeout(), near.getblocking()) == (0.0, False)
    near.setblocking(True)
    assert (near.gettimeout(), near.getblocking()) == (None, True)
    near.setblocking(False)
    assert (near.gettimeout(), near.getblocking()) == (0.0, False)
    near.settimeout(None)
    assert near.gettimeout() is None
    for wrong in (-1, -0.001, math.nan):
        with pytest.raises(ValueError):
            near.settimeout(wrong)
    with pytest.raises(TypeError):
        near.settimeout("1")  # type: ignore[arg-type]


def test_a_call_that_waits_too_long_times_out(pair: Pair) -> None:
    near, far = pair
    far.settimeout(0.01)
    calls: list[tuple[Any, Any]] = [(far.recv, 1), (far.recv_into, bytearray(1)), (far.recvmsg, 1)]
    for function, argument in calls:
        with pytest.raises(TimeoutError, match="timed out"):
            function(argument)
    near.settimeout(0.01)
    with pytest.raises(TimeoutError, match="timed out"):
        near.sendall(bytes(64 * 1024 * 1024))
    assert far.recv(1) == b"\0"  # a timeout breaks nothing


def test_a_non_blocking_end_never_waits(pair: Pair) -> None:
    near, far = pair
    far.setblocking(False)
    with pytest.raises(BlockingIOError):
        far.recv(1)
    sent = fill(near)
    with pytest.raises(BlockingIOError):
        near.sendall(bytes(64 * 1024 * 1024))
    far.settimeout(None)
    near.shutdown(socket.SHUT_WR)
    assert len(receive_all(far)) >= sent


def test_addresses_cross(pair: Pair) -> None:
    near, far = pair
    assert near.getpeername() == far.getsockname()
    assert near.getsockname() == far.getpeername()


def test_family_type_and_protocol(pair: Pair) -> None:
    near, _ = pair
    assert near.family is socket.AF_INET
    assert near.type is socket.SOCK_STREAM
    assert near.proto == socket.IPPROTO_TCP


def test_options_are_those_of_a_tcp_socket(pair: Pair) -> None:
    near, _ = pair
    near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > 0
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > 0
    linger = struct.pack("ii", 1, 5)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    assert near.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linger
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    assert_errno(errno.ENOPROTOOPT, near.getsockopt, socket.IPPROTO_TCP, 9999)
    assert_errno(errno.ENOPROTOOPT, near.setsockopt, socket.IPPROTO_TCP, 9999, 1)


def test_keepalive_is_the_users(pair: Pair) -> None:
    near, _ = pair
    keep = socket.SOL_SOCKET, socket.SO_KEEPALIVE
    idle = socket.IPPROTO_TCP, socket.TCP_KEEPIDLE
    system = int(Path("/proc/sys/net/ipv4/tcp_keepalive_time").read_text())
    assert near.getsockopt(*keep) == 0
    assert near.getsockopt(*idle) == system
    near.setsockopt(*keep, 1)
    near.setsockopt(*idle, 42)
    assert near.getsockopt(*keep) == 1
    assert near.getsockopt(*idle) == 42


def test_sendfile(pair: Pair) -> None:
    near, far = pair
    content = os.urandom(100_000)
    with tempfile.TemporaryFile() as file, ThreadPoolExecutor(1) as pool:
        file.write(content)
        received = pool.submit(receive_all, far)
        file.seek(0)
        assert near.sendfile(file) == 100_000
        assert near.sendfile(file, 1000, 50) == 50
        assert file.tell() == 1050
        assert near.sendfile(file, 99_999) == 1
        with pytest.raises(ValueError, match="positive"):
            near.sendfile(file, 0, 0)
        near.shutdown(socket.SHUT_WR)
        assert received.result() == content + content[1000:1050] + content[99_999:]
        near.setblocking(False)
        with pytest.raises(ValueError, match="non-blocking"):
            near.sendfile(file)


def test_several_readers_and_writers_share_the_stream(pair: Pair) -> None:
    near, far = pair
    writers, size = 4, 1_000_000
    with ThreadPoolExecutor(2 * writers) as pool:
        readers = [pool.submit(receive_all, far) for _ in range(writers)]
        jobs = [pool.submit(near.sendall, bytes([n]) * size) for n in range(writers)]
        for job in jobs:
            job.result()
        near.shutdown(socket.SHUT_WR)
        received = b"".join(reader.result() for reader in readers)
    assert [received.count(n) for n in range(writers)] == [size] * writers


class Interrupted(Exception):
    pass


def _raise(*_: object) -> None:
    raise Interrupted


@pytest.mark.parametrize("call", ["recv", "recv_into", "sendall", "send"])
def test_a_signal_handler_that_raises_ends_the_call(pair: Pair, call: str) -> None:
    near, _ = pair
    if call.startswith("send"):
        fill(near)
        near.settimeout(None)
    argument: Any = {"recv": 1, "recv_into": bytearray(1)}.get(call, bytes(64 * 1024 * 1024))
    before = signal.signal(signal.SIGALRM, _raise)
    try:
        with pytest.raises(Interrupted):
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            while True:  # a send that the other end's kernel makes room for goes on
                getattr(near, call)(argument)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_handler_that_returns_does_not_end_the_call(pair: Pair) -> None:
    near, far = pair
    before = signal.signal(signal.SIGALRM, lambda *_: near.sendall(b"from the handler"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert far.recv(64) == b"from the handler"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_end_cannot_be_pickled(pair: Pair) -> None:
    near, _ = pair
    with pytest.raises(TypeError, match="cannot pickle"):
        near.__reduce_ex__(4)
