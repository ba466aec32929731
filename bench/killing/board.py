"""Words that the controller and all workers share, and that outlive whoever is killed.

Every word has one writer at a time. An incarnation (one worker process) has an *area*; its *name*
is a number that says which area, and is never given again. The area of one that is gone is used
again only after ``AREAS`` others have ended, so that peers can still look up what became of it.
"""

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

AREAS = 512
LANES = 48
"""Threads or tasks of one worker that can be at work at once."""
RECORDS = 512
"""Sessions of one incarnation, as a client, that are looked up at once."""
PLACES = 256
"""Workers that can run at once."""

_HEAD_WORDS = 8
_LANE_WORDS = 8
_RECORD_WORDS = 16
_AREA_WORDS = _HEAD_WORDS + LANES * _LANE_WORDS + RECORDS * _RECORD_WORDS
_FIRST_AREA = PLACES


def incarnation(name: int) -> int:
    """Return the how-manieth worker of the run it is: unlike the name, the same in every run."""
    return name // AREAS


class Fate(IntEnum):
    """What becomes of an incarnation."""

    LIVING = 0
    CONDEMNED = 1
    """It is about to be killed, or to end because it has found a fault."""


class Stage(IntEnum):
    """What a worker has got to."""

    STARTING = 0
    RUNNING = 1
    NO_CLIENTS = 2
    """Its own connects are all over; it still accepts."""


class Doing(IntEnum):
    """What a lane is doing."""

    NOTHING = 0
    """Nobody uses it, or it waits for what need not come."""
    CONNECT = 1
    SEND = 2
    RECEIVE = 3
    END = 4
    CLOSE = 5


class Mark(IntFlag):
    """What an end says about the end of its stream before it brings it about."""

    FINISHED = 1
    """All is sent: the end of the stream is right."""
    BROKEN_OFF = 2
    """It closes in the middle."""


@dataclass
class Lane:
    """How far one thread or task is."""

    words: memoryview
    moments: dict[int, Callable[[], None]] = field(default_factory=dict)
    """What to do before which call."""
    calls: int = 0

    STEPS, DOING, SESSION, BYTES, SHARED, PLAIN, LOST = range(7)
    """Indices: calls that did something, ``Doing``, a session's key; then what is counted: bytes
    checked, sessions over shared memory and over TCP, streams that ended by a peer's death."""

    def begin(self, doing: Doing) -> None:
        """Begin a call, which must return."""
        if moment := self.moments.pop(self.calls, None):
            moment()
        self.calls += 1
        self.words[self.DOING] = doing

    def step(self) -> None:
        """Count a call that has done something."""
        self.words[self.STEPS] += 1

    def rest(self) -> None:
        """Say that nothing that must return is going on."""
        self.words[self.DOING] = Doing.NOTHING

    def add(self, counter: int, amount: int = 1) -> None:
        """Count something."""
        self.words[counter] += amount


@dataclass
class Record:
    """What the two ends of one session say of it."""

    words: memoryview

    KEY, ACCEPTED_BY, CLIENT, SERVER, LISTENER = 0, 1, 2, 8, 14
    """Indices: which session, the name of who accepted it, the words of either end, and whose
    listener the client has connected to. Of an end:"""
    STARTED, DONE, MARKS, TRANSPORT = range(4)
    """bytes it began to send, bytes it has sent, ``Mark``, 1 for shared memory or 2 for TCP."""

    def end(self, is_client: bool) -> memoryview:
        """Return the words of one end."""
        start = self.CLIENT if is_client else self.SERVER
        return self.words[start : start + 6]

    def __str__(self) -> str:
        ends = (
            f"{who} sent {end[self.DONE]} of {end[self.STARTED]}, {Mark(end[self.MARKS])!r}"
            for who, end in (("client", self.end(True)), ("server", self.end(False)))
        )
        return (
            f"session {self.words[self.KEY]:#x} to {self.words[self.LISTENER]:#x}, "
            f"accepted by {self.words[self.ACCEPTED_BY]:#x}: {'; '.join(ends)}"
        )

    def open(self, key: int) -> None:
        """Begin a new session, as its client."""
        self.words[self.KEY] = 0
        for index in range(1, _RECORD_WORDS):
            self.words[index] = 0
        self.words[self.KEY] = key


class Area:
    """What is said of one incarnation."""

    NAME, FATE, PORT, STAGE = range(4)

    def __init__(self, words: memoryview) -> None:
        self.words = words

    @property
    def name(self) -> int:
        """Whose area it is."""
        return self.words[self.NAME]

    def lane(self, index: int) -> Lane:
        """Return one of ``LANES``."""
        start = _HEAD_WORDS + index * _LANE_WORDS
        return Lane(self.words[start : start + _LANE_WORDS])

    def record(self, serial: int) -> Record:
        """Return the record of the session ``serial`` of this incarnation."""
        start = _HEAD_WORDS + LANES * _LANE_WORDS + serial % RECORDS * _RECORD_WORDS
        return Record(self.words[start : start + _RECORD_WORDS])

    def clear(self) -> None:
        """Forget whose it was; records go by their keys."""
        for index in range(_HEAD_WORDS + LANES * _LANE_WORDS):
            self.words[index] = 0


class Board:
    """All of it; made before the first fork."""

    def __init__(self) -> None:
        size = (_FIRST_AREA + AREAS * _AREA_WORDS) * 8
        self.words = memoryview(mmap.mmap(-1, size)).cast("Q")

    def places(self) -> list[int]:
        """Return the name of the worker at each place, 0 for none."""
        return self.words[:PLACES].tolist()

    def area(self, name: int) -> Area:
        """Return the area that an incarnation has, or had."""
        start = _FIRST_AREA + name % AREAS * _AREA_WORDS
        return Area(self.words[start : start + _AREA_WORDS])

    def record(self, key: int) -> Record:
        """Return the record that the session ``key`` has, or had."""
        return self.area(key >> 24).record(key & 0xFFFFFF)

    def is_condemned(self, name: int) -> bool:
        """Whether an incarnation was killed or is about to be, or is gone for long."""
        area = self.area(name)
        return area.words[Area.FATE] != Fate.LIVING or area.name != name
