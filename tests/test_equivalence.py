"""A session pair does what a TCP pair does, under the same random operations.

Both pairs get each operation in turn and must say the same: the same bytes, the same exception
(by class and errno), the end of the stream at the same place. What may differ, and no more:

* Amounts of single calls. A ``send`` may take and a ``recv`` may give fewer bytes than on the
  other pair, never none where the other has some. Where only the amount differs, the rest is
  sent or received before the pairs are compared again.
* One earlier error after the peer's close. The first ``send`` to a closed peer succeeds on TCP
  and may fail on a session; what is received after it may be a reset or the end, on either.
* Room made late. Where TCP would block, its kernel may take more once its own acknowledgements
  came; a session takes more only once its peer has received.
* SHUT_RD. TCP on Linux still takes data for a direction that its reader shut down; what is
  received there afterwards is not compared.

Nothing here waits for something that does not come, except the operations that time out.
"""

import socket
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from endpoints import Endpoint, fill, receive_exactly, session_pair, socket_pair

SIDES = st.sampled_from([0, 1])
SMALL = st.integers(1, 3000)
ROOM = 12_000
"""Bytes in flight that every pair takes without waiting (the smallest buffer is 16 KiB)."""
SHORT = 0.001
"""Seconds until an operation that waits in vain gives up."""


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a call returns or raises, comparable."""
    try:
        return function(*arguments)
    except (OSError, ValueError, TypeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        return type(error).__name__, number


def over_tcp(end: Endpoint) -> bool:
    return isinstance(end, socket.socket) or end.transport == "tcp"


class Pairs(RuleBasedStateMachine):
    """A TCP pair, a session pair, and a model of what both must be."""

    device: str

    def __init__(self) -> None:
        super().__init__()
        self.worlds: list[tuple[Endpoint, Endpoint]] = []

    @initialize()
    def connect(self) -> None:
        self.worlds = [socket_pair(), session_pair(self.device, buffer=16 * 1024)]
        self.flying: list[bytes] = [b"", b""]
        """Sent by this side and not received yet."""
        self.sent = [0, 0]
        self.write_shut = [False, False]
        self.read_shut = [False, False]
        self.closed = [False, False]
        self.timeout: list[float | None] = [None, None]

    def teardown(self) -> None:
        for world in self.worlds:
            for end in world:
                end.close()

    def both(self, side: int, call: Callable[[Endpoint], Any]) -> Any:
        """The outcome of ``call`` on ``side``, which is the same in both worlds."""
        tcp, session = (outcome(call, world[side]) for world in self.worlds)
        assert session == tcp
        return tcp

    def ends(self, side: int) -> list[Endpoint]:
        return [world[side] for world in self.worlds]

    def is_open(self, side: int) -> bool:
        return bool(self.worlds) and not self.closed[side]

    def is_whole(self, side: int) -> bool:
        return self.is_open(side) and not self.closed[1 - side]

    def can_write(self, side: int) -> bool:
        return self.is_whole(side) and not self.write_shut[side] and not self.read_shut[1 - side]

    def waiting_to_read(self, side: int) -> bytes:
        return self.flying[1 - side]

    def pattern(self, side: int, size: int) -> bytes:
        start = self.sent[side]
        return bytes((start + n) % 251 for n in range(size))

    def note_sent(self, side: int, data: bytes) -> None:
        self.flying[side] += data
        self.sent[side] += len(data)

    def note_received(self, side: int, size: int) -> None:
        self.flying[1 - side] = self.flying[1 - side][size:]

    # Sending

    @precondition(lambda self: any(map(self.can_write, (0, 1))))
    @rule(side=SIDES, size=SMALL, how=st.sampled_from(["send", "sendall", "sendmsg", "sendto"]))
    def send(self, side: int, size: int, how: str) -> None:
        if not self.can_write(side) or len(self.flying[side]) + size > ROOM:
            return
        data = self.pattern(side, size)
        for end in self.ends(side):
            match how:
                case "sendall":
                    end.sendall(data)
                    sent = size
                case "sendmsg":
                    sent = end.sendmsg([data[: size // 2], data[size // 2 :]])
                case "sendto":
                    sent = end.sendto(data, ("192.0.2.1", 1))
                case _:
                    sent = end.send(data)
            assert 0 < sent <= size
            if sent < size:  # permitted: amounts of single calls
                end.sendall(data[sent:])
        self.note_sent(side, data)

    @precondition(lambda self: any(map(self.can_write, (0, 1))))
    @rule(side=SIDES)
    def send_until_it_would_block_and_drain(self, side: int) -> None:
        if not self.can_write(side) or self.closed[1 - side]:
            return
        for world in self.worlds:
            sent = fill(world[side])
            assert sent > 0
            while isinstance(more := outcome(world[side].send, bytes(4)), int):
                assert over_tcp(world[side])  # permitted: room made late
                sent += more
            assert more[0] == "BlockingIOError"
            world[side].settimeout(self.timeout[side])
            world[1 - side].settimeout(None)
            before = self.flying[side]
            assert receive_exactly(world[1 - side], len(before) + sent) == before + bytes(sent)
            world[1 - side].settimeout(self.timeout[1 - side])
        self.flying[side] = b""

    @precondition(lambda self: any(map(self.can_write, (0, 1))))
    @rule(side=SIDES)
    def send_nothing(self, side: int) -> None:
        if self.can_write(side):
            assert self.both(side, lambda end: end.send(b"")) == 0
            assert self.both(side, lambda end: end.sendall(b"")) is None

    @rule(side=SIDES)
    def send_after_shutdown(self, side: int) -> None:
        if self.is_whole(side) and self.write_shut[side]:
            result = self.both(side, lambda end: end.send(b"x"))
            assert result[0] == "BrokenPipeError"

    # Receiving

    @rule(
        side=SIDES,
        size=SMALL,
        how=st.sampled_from(["recv", "recv_into", "recvmsg", "recvfrom", "peek", "dontwait"]),
    )
    def receive(self, side: int, size: int, how: str) -> None:
        there = self.waiting_to_read(side)
        if not self.is_open(side) or self.read_shut[side] or not there:
            return
        for end in self.ends(side):
            end.settimeout(None)  # it is there, or on its way
            if how == "dontwait":
                assert end.recv(1, socket.MSG_PEEK) == there[:1]
            data = self.received(end, size, how)
            assert data
            assert data == there[: len(data)]
            assert len(data) <= size
            if how != "peek" and len(data) < min(size, len(there)):
                rest = min(size, len(there)) - len(data)  # permitted: amounts of single calls
                assert receive_exactly(end, rest) == there[len(data) :][:rest]
            end.settimeout(self.timeout[side])
        if how != "peek":
            self.note_received(side, size)

    def received(self, end: Endpoint, size: int, how: str) -> bytes:
        match how:
            case "recv_into":
                buffer = bytearray(size)
                return bytes(buffer[: end.recv_into(buffer)])
            case "recvmsg":
                data, ancillary, _, address = end.recvmsg(size)
                assert (ancillary, address) == ([], None)
                return data
            case "recvfrom":
                return end.recvfrom(size)[0]
            case "peek":
                return end.recv(size, socket.MSG_PEEK)
            case "dontwait":
                return end.recv(size, socket.MSG_DONTWAIT)
            case _:
                return end.recv(size)

    @rule(side=SIDES, size=SMALL)
    def receive_all_of_it(self, side: int, size: int) -> None:
        there = self.waiting_to_read(side)
        if self.is_open(side) and not self.read_shut[side] and len(there) >= size:
            for end in self.ends(side):
                end.settimeout(None)
            whole = self.both(side, lambda end: end.recv(size, socket.MSG_WAITALL))
            assert whole == there[:size]
            for end in self.ends(side):
                end.settimeout(self.timeout[side])
            self.note_received(side, size)

    @rule(side=SIDES, how=st.sampled_from(["recv", "recv_into", "peek", "dontwait", "recvmsg"]))
    def receive_where_nothing_is(self, side: int, how: str) -> None:
        """The end, or a wait in vain."""
        if not self.is_open(side) or self.read_shut[side] or self.waiting_to_read(side):
            return
        ended = self.write_shut[1 - side] or self.closed[1 - side]
        waits = self.timeout[side]
        for end in self.ends(side):
            if ended:
                end.settimeout(None)  # the end may still be on its way
            elif waits is None:
                end.settimeout(SHORT)
        if how == "dontwait":
            if ended:
                how = "recv"
            elif waits is None:  # with a timeout a socket waits, MSG_DONTWAIT or not
                for end in self.ends(side):
                    end.settimeout(None)
        result = self.both(side, lambda end: self.received(end, 10, how))
        if ended:
            assert result == b""
        elif waits == 0.0 or (waits is None and how == "dontwait"):
            assert result[0] == "BlockingIOError"
        else:
            assert result[0] == "TimeoutError"
        for end in self.ends(side):
            end.settimeout(waits)

    @rule(side=SIDES)
    def receive_nothing(self, side: int) -> None:
        if self.is_open(side):
            assert self.both(side, lambda end: end.recv(0)) == b""

    @rule(
        side=SIDES,
        wrong=st.sampled_from(
            [
                lambda end: end.recv(-1),
                lambda end: end.recv_into(bytearray(2), 3),
                lambda end: end.recv_into(bytearray(2), -1),
                lambda end: end.recv_into(b"read only"),
                lambda end: end.send("text"),
                lambda end: end.settimeout(-1),
                lambda end: end.shutdown(99),
                lambda end: end.getsockopt(socket.IPPROTO_TCP, 9999),
            ]
        ),
    )
    def misuse(self, side: int, wrong: Callable[[Endpoint], Any]) -> None:
        if self.is_whole(side):
            kind, _ = self.both(side, wrong)
            assert kind.endswith("Error")

    # Timeouts

    @rule(side=SIDES, timeout=st.sampled_from([None, 0.0, SHORT]))
    def set_timeout(self, side: int, timeout: float | None) -> None:
        if self.is_open(side):
            self.both(side, lambda end: end.settimeout(timeout))
            self.timeout[side] = timeout
            assert self.both(side, lambda end: end.gettimeout()) == timeout
            assert self.both(side, lambda end: end.getblocking()) == (timeout != 0.0)

    # Ending

    @rule(side=SIDES)
    def shut_writing(self, side: int) -> None:
        """Also after the peer shut its side, or closed."""
        if self.is_open(side) and not self.write_shut[side]:
            assert self.both(side, lambda end: end.shutdown(socket.SHUT_WR)) is None
            self.write_shut[side] = True

    @rule(side=SIDES)
    def shut_reading(self, side: int) -> None:
        if self.is_whole(side) and not any(self.write_shut) and not self.waiting_to_read(side):
            assert self.both(side, lambda end: end.shutdown(socket.SHUT_RD)) is None
            assert self.both(side, lambda end: end.recv(1)) == b""
            self.read_shut[side] = True  # permitted: what comes now is not compared

    @rule(side=SIDES)
    def close(self, side: int) -> None:
        if self.is_whole(side) and not self.waiting_to_read(side):
            self.both(side, lambda end: end.close())
            self.closed[side] = True

    @rule(side=SIDES)
    def close_with_unread_data(self, side: int) -> None:
        """A reset: the other end gets what was sent before, then the error."""
        other = 1 - side
        if not self.is_whole(side) or not self.waiting_to_read(side) or self.read_shut[other]:
            return
        for end in self.ends(side):
            end.settimeout(None)
            assert end.recv(1, socket.MSG_PEEK)  # it has arrived
        if self.write_shut[side] or self.flying[side]:
            return  # TCP on Linux may drop what was on its way
        self.both(side, lambda end: end.close())
        self.closed[side] = True
        for end in self.ends(other):
            end.settimeout(None)
        assert self.both(other, lambda end: end.recv(1))[0] == "ConnectionResetError"
        assert self.both(other, lambda end: end.recv(1)) == b""
        assert self.both(other, lambda end: end.send(b"x"))[0] == "BrokenPipeError"
        self.both(other, lambda end: end.close())
        self.closed[other] = True

    @rule(side=SIDES)
    def send_to_the_closed(self, side: int) -> None:
        """It fails at last, and the end that did it is of no more use."""
        if not self.is_open(side) or not self.closed[1 - side] or self.write_shut[side]:
            return
        for end in self.ends(side):
            end.settimeout(None)
            # Permitted: the first may succeed.
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while True:
                    end.send(b"x")
        self.both(side, lambda end: end.close())
        self.closed[side] = True

    @rule(side=SIDES)
    def use_the_closed(self, side: int) -> None:
        if self.worlds and self.closed[side]:
            assert self.both(side, lambda end: end.fileno()) == -1
            for call in (
                lambda end: end.recv(1),
                lambda end: end.send(b"x"),
                lambda end: end.shutdown(socket.SHUT_WR),
                lambda end: end.getpeername(),
            ):
                assert self.both(side, call)[0] == "OSError"
            assert self.both(side, lambda end: end.close()) is None


@pytest.mark.parametrize("examples", [300])
def test_a_session_pair_agrees_with_a_tcp_pair(device: str, examples: int) -> None:
    class OnDevice(Pairs):
        pass

    OnDevice.device = device
    OnDevice.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    OnDevice.TestCase("runTest").runTest()
