"""One end of a session: what it sends and receives, and its judgement of what it saw.

What an end does is a *program*: a generator of operations, which a driver performs as it likes
(``drivers``), sending results and connection errors back in.
"""

import contextlib
import errno
import random
import socket
import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

import ivsmc
from killing.board import Area, Board, Lane, Mark, Record, incarnation
from killing.script import Script, logarithmic

PERIOD = (1 << 22) + 4099
"""Bytes of noise that all streams are taken from, each from a place of its own."""
LARGEST_PIECE = 1 << 18
_INTRODUCTION = struct.Struct("<8sQ")
_MAGIC = b"kills.py"


class FaultFoundError(Exception):
    """What must not be."""


class BreakOffError(Exception):
    """The script says to close now, in the middle."""


class _StreamEndedError(Exception):
    """What is received has ended before all of it was there."""


@dataclass(frozen=True)
class World:
    """What all workers have in common."""

    board: Board
    seed: int
    device: str
    noise: bytes
    """``PERIOD`` bytes, and the first ``LARGEST_PIECE`` of them again."""
    fault: str | None
    """What is made wrong on purpose."""

    @staticmethod
    def noise_of(seed: int) -> bytes:
        """Make the noise of a run."""
        once = random.Random(f"noise {seed}").randbytes(PERIOD)
        return once + once[:LARGEST_PIECE]


@dataclass(frozen=True)
class Operation:
    """Send ``data``, or, without, receive at most ``size`` bytes."""

    data: bytes = b""
    size: int = 0


Program: TypeAlias = Generator[Operation, Any, None]


class End:
    """One end of one session."""

    def __init__(self, world: World, session: ivsmc.Session, lane: Lane, own_name: int) -> None:
        self.session = session
        self.broke_off = False
        self._world = world
        self._lane = lane
        self._own_name = own_name
        self._chance = random.Random()
        self._calls = 0
        self._sent = self._received = 0
        self._cut: str | None = None
        self._saw_end = self._saw_reset = self._was_told = False

    def as_client(self, key: int, record: Record, listener: tuple[int, int]) -> Program:
        """Be the client of the session ``key`` with the ``listener`` (its name and port)."""
        self._listener = listener
        record.words[Record.LISTENER] = listener[0]
        self._begin(key, record, is_client=True)
        return self._introduce(key)

    def as_server(self) -> Program:
        """Be the server: learn from the client which session this is."""
        return self._be_introduced()

    @property
    def is_known(self) -> bool:
        """Whether it is known which session this is. If not the client was killed before."""
        return hasattr(self, "script")

    def _begin(self, key: int, record: Record, *, is_client: bool) -> None:
        name = f"{incarnation(key >> 24)} {key & 0xFFFFFF}"
        self.script = Script.of(self._world.seed, name, PERIOD)
        self.is_client = is_client
        self._key = key
        self._chance = random.Random(f"end {self._world.seed} {name} {is_client}")
        self._record = record
        self._own = record.end(is_client)
        self._others = record.end(not is_client)
        self._to_send, self._to_receive = self.script.sizes[:: 1 if is_client else -1]
        self._send_start, self._receive_start = self.script.starts[:: 1 if is_client else -1]
        self._lane.words[Lane.SESSION] = key
        self._own[Record.TRANSPORT] = 1 if self.session.transport == "smc" else 2

    def _introduce(self, key: int) -> Program:
        data = _INTRODUCTION.pack(_MAGIC, key)
        try:
            while data:
                data = data[(yield Operation(data)) :]
        except ConnectionError as error:
            self._fail_to_send(error)

    def _be_introduced(self) -> Program:
        data = b""
        try:
            while missing := _INTRODUCTION.size - len(data):
                part = yield Operation(size=missing)
                if not part:
                    return
                data += part
        except ConnectionError:
            return
        magic, key = _INTRODUCTION.unpack(data)
        if magic != _MAGIC:
            raise FaultFoundError(f"the first bytes of a session are {data!r}")
        record = self._world.board.record(key)
        if record.words[Record.KEY] == key:
            record.words[Record.ACCEPTED_BY] = self._own_name
        elif not self._world.board.is_condemned(key >> 24):
            raise FaultFoundError(f"a session says that it is {key:#x}, which is not on the board")
        self._begin(key, record, is_client=False)

    def programs(self) -> list[Program]:
        """Return what to do, all at once; then comes ``ending``."""
        if self._cut:
            return [self._receive_rest()]
        if self.script.turns:
            return [self._take_turns()]
        return [self._send_all(), self._receive_rest()]

    def _take_turns(self) -> Program:
        try:
            for by_client, size in self.script.turns:
                if by_client == self.is_client:
                    yield from self._sending(size)
                else:
                    yield from self._receiving(size)
        except ConnectionError as error:
            self._fail_to_send(error)
            yield from self._receive_rest()
        except _StreamEndedError:
            pass

    def _send_all(self) -> Program:
        try:
            yield from self._sending(self._to_send)
            if self.script.closes_first is None:
                self._shut_down()
        except ConnectionError as error:
            self._fail_to_send(error)

    def _fail_to_send(self, error: ConnectionError) -> None:
        self._was_told = True
        self._cut = f"sending: {error!r}"

    def _receive_rest(self) -> Program:
        try:
            yield from self._receiving(self._to_receive - self._received)
            if self._cut:
                yield from self._receive_end()
        except _StreamEndedError:
            pass

    def ending(self) -> Program:
        """End the session as the script says, unless the peer has."""
        if self._saw_end or self._saw_reset or self.broke_off:
            return
        if self._cut is None and self.script.closes_first is None and self.script.turns:
            self._shut_down()
        if self._cut or self.script.closes_first != self.is_client:
            with contextlib.suppress(_StreamEndedError):
                yield from self._receive_end()
        self._own[Record.MARKS] |= Mark.FINISHED

    def _shut_down(self) -> None:
        self._own[Record.MARKS] |= Mark.FINISHED
        try:
            self.session.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # a TCP socket whose peer has reset it
                raise
            self._cut = repr(error)

    def _sending(self, size: int) -> Program:
        end = self._sent + size
        while left := end - self._sent:
            self._count_call()
            length = 1 + logarithmic(self._chance, min(left, LARGEST_PIECE) - 1)
            data = self._noise(self._send_start + self._sent, length)
            if self._world.fault == "byte" and self._key & 0xFFFFFF == 3:
                data = bytes([data[0] ^ 1]) + data[1:]
            self._own[Record.STARTED] = self._sent + length
            self._sent += yield Operation(data)
            self._own[Record.DONE] = self._sent

    def _receiving(self, size: int) -> Program:
        end = self._received + size
        while left := end - self._received:
            self._count_call()
            length = 1 + logarithmic(self._chance, min(left, LARGEST_PIECE) - 1)
            data = yield from self._receive(length)
            if data != self._noise(self._receive_start + self._received, len(data)):
                raise FaultFoundError(
                    f"wrong bytes among the {len(data)} after {self._received} in {self}"
                )
            self._received += len(data)
            self._lane.add(Lane.BYTES, len(data))

    def _receive_end(self) -> Program:
        if data := (yield from self._receive(100)):
            raise FaultFoundError(f"{len(data)} bytes and more after the last of {self}")

    def _receive(self, size: int) -> Generator[Operation, bytes, bytes]:
        try:
            data = yield Operation(size=size)
        except ConnectionError as error:
            self._saw_reset = True
            self._cut = f"receiving: {error!r}"
            raise _StreamEndedError from None
        if not data:
            self._saw_end = True
            if self._received < self._to_receive:
                self._cut = "the end of the stream"
                raise _StreamEndedError
        return data

    def _noise(self, position: int, size: int) -> bytes:
        start = position % PERIOD
        return self._world.noise[start : start + size]

    def _count_call(self) -> None:
        self._calls += 1
        if self.script.breaks_off and self._calls > self.script.breaks_off[1]:
            if self.script.breaks_off[0] != self.is_client:
                return
            if self._world.fault != "reset":
                self._own[Record.MARKS] |= Mark.BROKEN_OFF
            self.broke_off = True
            raise BreakOffError

    def judge(self) -> None:
        """Say whether all was as it must be; to be called before the session is closed."""
        if self.broke_off:
            return
        board = self._world.board
        is_whole = self._cut is None and self._received == self._to_receive
        peer = self._record.words[Record.ACCEPTED_BY] if self.is_client else self._key >> 24
        started, done, marks, transport = self._others[:4]
        if self._record.words[Record.KEY] != self._key:
            # Only a client that is gone for long, or has moved on, has made something else of it.
            if not is_whole and not board.is_condemned(peer):
                raise FaultFoundError(f"{self} broke off long after its client: {self._cut}")
            return
        if transport and transport != self._own[Record.TRANSPORT]:
            raise FaultFoundError(f"the ends of {self} differ in what it goes over")
        if self._received > started:
            raise FaultFoundError(f"{self._received} bytes of {started} that were sent in {self}")
        if is_whole:
            return
        if not peer:
            peer, port = self._listener
            if board.area(peer).words[Area.PORT] != port:
                return  # its listener was closed before it accepted
        if not marks & Mark.BROKEN_OFF and not board.is_condemned(peer):
            raise FaultFoundError(f"{self} broke off, and its peer lives: {self._cut}")
        self._lane.add(Lane.LOST)
        if transport != 1 or marks & Mark.BROKEN_OFF:
            return  # TCP drops what was sent when the sender's kernel resets the connection
        if self._received < done:
            raise FaultFoundError(
                f"{self._received} bytes of {done} that its killed peer had sent, in {self}"
            )
        # A reset is told once, as TCP does; who was told while it sent then receives an end.
        told = self._saw_reset or self._was_told
        if not told and not (marks & Mark.FINISHED and self._received == self._to_receive):
            raise FaultFoundError(f"the killed peer seems to have ended {self}")

    def __str__(self) -> str:
        return (
            f"session {self._key:#x} ({'client' if self.is_client else 'server'}, "
            f"{self.session!r}; sent {self._sent} of {self._to_send}, "
            f"received {self._received} of {self._to_receive})"
        )
