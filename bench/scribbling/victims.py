"""The victims: a process that listens and one that connects, with streams both ends know.

They may lose a session, with an exception that is documented. They must not end, hang or spin.
"""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

import ivsmc
from ivsmc import _native
from scribbling.layout import Slot
from soaking.members import Weight
from soaking.streams import HEADER, STREAM, Wrong, exchange, receive_exactly

LOOPBACK = "127.0.0.1"
_LARGEST = 1 << 24
"""Bytes each way of a session at most."""
_CONNECT = 10.0
"""Seconds to connect."""


@dataclass(frozen=True)
class Begin:
    """Attach to a device; a client connects to ``address``."""

    device: str
    patience: float
    """Seconds a call may take: a wake-up that was written over does not come."""
    address: tuple[str, int] | None = None


@dataclass(frozen=True)
class Run:
    """Stream until told to stop."""

    seed: int


@dataclass(frozen=True)
class Weigh:
    """Say what the process holds."""


Order = Begin | Run | Weigh
Outcomes = Counter[str]
"""How sessions ended: ``whole``, ``wrong``, or the name of an exception; and ``over tcp``."""


def _attempt(outcomes: Outcomes, action: Callable[[], Any]) -> None:
    """Do it, and note how it ended; only what users are told of may happen."""
    try:
        action()
    except Wrong:
        outcomes["wrong"] += 1
    except OSError as error:  # all that ivsmc raises
        outcomes[type(error).__name__] += 1
    else:
        outcomes["whole"] += 1


class _Victim:
    """What both have: the device that is open, and the slot this process has there."""

    def __init__(self, stop: Event) -> None:
        self.stop = stop
        self.begin: Begin | None = None
        self.opened: ivsmc.Device | None = None

    def attach(self, begin: Begin) -> Slot:
        self.begin = begin
        self.opened = ivsmc.open_device(begin.device)
        index, _, generation = str(self.opened.stats()["slot"]).partition(".")
        return Slot(int(index), int(generation))

    def detach(self) -> None:
        if self.opened is not None:
            self.opened.close()
            self.opened = None
        # A process stays attached to what it has used; the next round has another region.
        while not _native.shutdown():
            time.sleep(0.002)


@contextlib.contextmanager
def server(stop: Event) -> Iterator[Callable[[Order], object]]:
    """Listen, and stream with who connects."""
    victim = _Victim(stop)
    listener: ivsmc.Listener | None = None
    failures: list[BaseException] = []

    def serve(session: ivsmc.Session, outcomes: Outcomes, patience: float) -> None:
        def stream() -> None:
            session.settimeout(patience)
            header = receive_exactly(session.recv, HEADER.size)
            if len(header) < HEADER.size:
                raise Wrong("the stream ended early")
            what, seed, total = HEADER.unpack(header)
            if what != STREAM or total > _LARGEST:
                raise Wrong("what the client asks for")
            exchange(session, seed + 1, seed, total)

        try:
            with session:
                _attempt(outcomes, stream)
        except BaseException as error:
            failures.append(error)

    def run(patience: float) -> Outcomes:
        assert listener is not None
        outcomes: Outcomes = Counter()
        threads = []
        listener.settimeout(0.1)
        while not stop.is_set():
            try:
                session, _ = listener.accept()
            except TimeoutError:
                continue
            threads.append(threading.Thread(target=serve, args=(session, outcomes, patience)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return outcomes

    def work(order: Order) -> object:
        nonlocal listener
        if isinstance(order, Begin):
            slot = victim.attach(order)
            listener = ivsmc.create_server((LOOPBACK, 0), device=order.device)
            return slot, listener.getsockname()
        if isinstance(order, Weigh):
            return Weight.now()
        assert listener is not None
        assert victim.begin is not None
        try:
            return run(victim.begin.patience)
        finally:
            listener.close()
            victim.detach()

    yield work


@contextlib.contextmanager
def client(stop: Event) -> Iterator[Callable[[Order], object]]:
    """Connect and stream, one session after the other."""
    victim = _Victim(stop)

    def one(begin: Begin, rng: random.Random, outcomes: Outcomes) -> None:
        assert begin.address is not None
        seed = rng.getrandbits(60)
        total = int(2 ** rng.uniform(0, _LARGEST.bit_length() - 1))
        with ivsmc.create_connection(begin.address, _CONNECT, device=begin.device) as session:
            outcomes["over tcp"] += session.transport == "tcp"
            session.settimeout(begin.patience)
            session.sendall(HEADER.pack(STREAM, seed, total))
            exchange(session, seed, seed + 1, total)

    def work(order: Order) -> object:
        if isinstance(order, Begin):
            return victim.attach(order)
        if isinstance(order, Weigh):
            return Weight.now()
        begin = victim.begin
        assert begin is not None
        rng = random.Random(order.seed)
        outcomes: Outcomes = Counter()
        while not stop.is_set():
            _attempt(outcomes, lambda: one(begin, rng, outcomes))
            time.sleep(rng.uniform(0, 0.002))
        victim.detach()
        return outcomes

    yield work
