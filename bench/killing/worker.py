"""A worker: one process that listens, connects to others, and is killed or leaves at the end."""

import contextlib
import gc
import itertools
import json
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ivsmc
from ivsmc import _native
from killing.board import Area, Doing, Fate, Lane, Record, incarnation
from killing.ends import FaultFoundError, World
from killing.script import RINGS, Life, logarithmic
from killing.timers import signal_after

LOOPBACK = "127.0.0.1"
_SHUTDOWN_TRIES = 1000
_FOR_EVER = Counter({"/[aio] (deleted)": 1})
"""What a process keeps once it has notified by doorbell (``rust/shm/src/aio.rs``)."""


@dataclass(frozen=True)
class Wires:
    """Descriptors between the controller and a worker."""

    reports: int
    """Where the worker writes lines to."""
    finish: int
    """Ends when no more connects are to be begun."""
    leave: int
    """Ends when all workers are done with that: nobody is to be accepted any more."""


@dataclass(frozen=True)
class Holdings:
    """What a process holds of the machine."""

    descriptors: Counter[str]
    mappings: Counter[str]
    """Shared ones."""
    threads: int

    @classmethod
    def now(cls) -> "Holdings":
        """Of this process."""
        names = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists them
                names.append(str(entry.readlink()))
        maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
        return cls(
            descriptors=Counter(names),
            mappings=Counter(parts[-1] for parts in maps if parts[1].endswith("s")),
            threads=len(list(Path("/proc/self/task").iterdir())),
        )


class Worker:
    """What threads and tasks have in common."""

    def __init__(self, world: World, wires: Wires, name: int, life: Life) -> None:
        self.world = world
        self.wires = wires
        self.name = name
        self.number = incarnation(name)
        self.life = life
        self.area = world.board.area(name)
        self.is_stopping = False
        self.clients = [
            (self.area.lane(2 * index), self.area.lane(2 * index + 1))
            for index in range(life.lanes)
        ]
        self._serials = itertools.count(1)
        self._wake_read, self._wake_write = os.pipe()
        self._plan_moments()

    def _plan_moments(self) -> None:
        kill, pause = self.life.kill, self.life.pause
        if kill:
            lane, _ = self.clients[kill.lane]
            lane.moments[kill.step] = self.leave_early if self.life.leaves else self._condemn
        if pause:
            lane, _ = self.clients[pause.lane]
            lane.moments.setdefault(pause.step, lambda: signal_after(signal.SIGSTOP, pause.delay))

    def _condemn(self) -> None:
        assert self.life.kill
        self.condemn_after(self.life.kill.delay)

    def condemn_after(self, nanoseconds: int) -> None:
        """Have this process killed, and say so first."""
        self.area.words[Area.FATE] = Fate.CONDEMNED
        signal_after(signal.SIGKILL, nanoseconds)

    def leave_early(self) -> None:
        """Have the main thread begin to leave."""
        os.write(self._wake_write, b"!")

    def report(self, kind: str, text: str) -> None:
        """Tell the controller; whole lines, however many write."""
        line = json.dumps({"kind": kind, "worker": self.name, "text": text[-3000:]})
        os.write(self.wires.reports, line.encode() + b"\n")

    def fail(self) -> None:
        """Report the exception in hand and end; peers may lose their sessions by that."""
        self.area.words[Area.FATE] = Fate.CONDEMNED
        self.report("fault", traceback.format_exc())
        os._exit(1)

    def guarded(self, job: Any, *arguments: Any) -> None:
        """Call ``job``; what it raises is a fault."""
        try:
            job(*arguments)
        except BaseException:
            self.fail()

    def run(self) -> None:
        """Live; returns only when it has left and given everything back."""
        before = Holdings.now()
        self.clients[0][0].begin(Doing.NOTHING)  # so that it can be killed while it attaches
        self.live()
        for descriptor in (self._wake_read, self._wake_write):
            os.close(descriptor)
        if self.world.fault == "descriptor":
            os.dup(self.wires.reports)
        self._check_holdings(before)

    def live(self) -> None:
        """Listen, connect, accept, until it is over."""
        raise NotImplementedError

    def _check_holdings(self, before: Holdings) -> None:
        gc.collect()
        for _ in range(_SHUTDOWN_TRIES):  # threads that were joined are listed for a moment
            left = _native.shutdown()
            after = Holdings.now()
            if left and after.threads <= before.threads:
                break
            select.select([], [], [], 0.001)
        if not left:
            raise FaultFoundError("something is still open in a process that has closed all")
        if kept := after.descriptors - before.descriptors:
            raise FaultFoundError(f"descriptors are left over: {kept}")
        if kept := after.mappings - before.mappings - _FOR_EVER:
            raise FaultFoundError(f"mappings are left over: {kept}")
        if after.threads > before.threads:
            raise FaultFoundError(f"threads are left over: {after.threads - before.threads}")

    def listen(self) -> ivsmc.Listener:
        """Open a listener and tell where it is."""
        listener = ivsmc.create_server(
            (LOOPBACK, 0), device=self.world.device, buffer=self.life.ring
        )
        self.area.words[Area.PORT] = listener.getsockname()[1]
        return listener

    def close(self, listener: ivsmc.Listener) -> None:
        """Close it; who was not accepted yet is reset, and can see why."""
        self.area.words[Area.PORT] = 0
        listener.close()

    def find_listener(self, chance: random.Random) -> tuple[int, int] | None:
        """Return the name and port of a random worker that listens, perhaps this one."""
        board = self.world.board
        places = [name for name in board.places() if name]
        name = chance.choice(places)
        port = board.area(name).words[Area.PORT]
        return (name, port) if port else None

    def new_session(self) -> tuple[int, Record]:
        """Return the key and the record of a session that this one will be the client of."""
        serial = next(self._serials)
        key = self.name << 24 | serial
        record = self.area.record(serial)
        record.open(key)
        return key, record

    def connect_options(self, chance: random.Random) -> dict[str, Any]:
        """Return what to give to ``create_connection`` beside the address."""
        return {
            "device": self.world.device,
            "timeout": chance.choice((None, None, 60, 0.01 + logarithmic(chance, 1000) / 1000)),
            "require": chance.choice((None, None, None, "smc")),
            "buffer": chance.choice(RINGS),
        }

    def judge_refusal(self, error: OSError, listener: tuple[int, int], options: Any) -> None:
        """Raise a fault unless the connect might fail so."""
        name, port = listener
        board = self.world.board
        if isinstance(error, ivsmc.SMCRequired):
            self.report("required", "shared memory, and refused without")
            return
        is_gone = board.is_condemned(name) or board.area(name).words[Area.PORT] != port
        if isinstance(error, TimeoutError):
            is_right = options["timeout"] not in (None, 60)
        else:
            is_right = isinstance(error, ConnectionError) and is_gone
        if not is_right:
            raise FaultFoundError(f"a connect to {port} of {name:#x} failed, which lives")

    def count(self, session: ivsmc.Session, lane: Lane) -> None:
        """Count a session, and why it is on TCP if it is."""
        reason = session.fallback_reason
        lane.add(Lane.PLAIN if reason else Lane.SHARED)
        if reason:
            self.report("fallback", reason.name)
        if self.world.fault == "hang" and self.number == 1:
            while True:
                time.sleep(1)
