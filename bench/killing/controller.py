"""Starts workers, sees them killed, decides whether one hangs, and counts."""

import contextlib
import gc
import json
import os
import signal
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import NoReturn

from killing.board import AREAS, LANES, Area, Fate, Lane, Stage
from killing.ends import World
from killing.script import Life
from killing.task_worker import TaskWorker
from killing.thread_worker import ThreadWorker
from killing.timers import die_with_parent
from killing.watch import Watch
from killing.worker import Wires

_TURN = 0.02
"""Seconds the controller sleeps at most."""
ENOUGH = 20
"""Faults after which a run ends."""


@dataclass
class Running:
    """A worker that runs."""

    name: int
    place: int
    life: Life
    resume_at: float | None = None
    """When it is to go on, if it is stopped."""


@dataclass
class Totals:
    """What a run has come to."""

    kills: int = 0
    left: int = 0
    started: int = 0
    pauses: int = 0
    lanes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


class Controller:
    """One run; to be used in a process without threads that has no device."""

    def __init__(self, world: World, processes: int, survivors: int, patience: int) -> None:
        self.totals = Totals()
        self._world = world
        self._board = world.board
        self._processes = processes
        self._survivors = survivors
        self._free_areas = deque(range(AREAS))
        self._running: dict[int, Running] = {}
        self._reports, self._reports_write = os.pipe()
        os.set_blocking(self._reports, False)
        self._unread = b""
        self._finish = os.pipe()
        self._leave = os.pipe()
        self._watch = Watch(world.board, patience)

    def run(self, kills: int) -> None:
        """Run until so many were killed, then let the others finish."""
        gc.freeze()  # workers then copy fewer pages
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            for place in range(self._processes):
                self._start(place)
            while self.totals.kills < kills and not self._is_over:
                self._turn(restart=True)
                self._show(kills)
            os.close(self._finish[1])
            while not all(
                self._board.area(running.name).words[Area.STAGE] == Stage.NO_CLIENTS
                for running in self._running.values()
            ):
                if self._is_over:
                    break
                self._turn(restart=False)
            os.close(self._leave[1])
            while self._running and not self._is_over:
                self._turn(restart=False)
        finally:
            for pid in self._running:
                os.kill(pid, signal.SIGKILL)
            for pid in list(self._running):
                os.waitpid(pid, 0)
            self._read_reports()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for descriptor in (self._reports, self._reports_write, self._finish[0], self._leave[0]):
                os.close(descriptor)

    @property
    def _is_over(self) -> bool:
        return len(self.totals.faults) >= ENOUGH or self._watch.has_found

    def _start(self, place: int) -> None:
        area_index = self._free_areas.popleft()
        self.totals.started += 1
        name = self.totals.started * AREAS + area_index
        life = Life.of(self._world.seed, self.totals.started, self.totals.started > self._survivors)
        area = self._board.area(name)
        area.clear()
        area.words[Area.NAME] = name
        self._board.words[place] = name
        pid = os.fork()
        if pid == 0:
            self._be_worker(name, life)
        self._running[pid] = Running(name, place, life)

    def _be_worker(self, name: int, life: Life) -> NoReturn:
        status = 1
        try:
            die_with_parent()
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for descriptor in (self._reports, self._finish[1], self._leave[1]):
                with contextlib.suppress(OSError):  # closed already, when it is all over
                    os.close(descriptor)
            self._watch.prepare_worker()
            wires = Wires(self._reports_write, self._finish[0], self._leave[0])
            kind = TaskWorker if life.is_asynchronous else ThreadWorker
            worker = kind(self._world, wires, name, life)
            worker.guarded(worker.run)
            status = 0
        finally:
            os._exit(status)

    def _turn(self, *, restart: bool) -> None:
        signal.sigtimedwait({signal.SIGCHLD}, _TURN)
        for pid, status in self._changes():
            self._see(pid, status)
        now = time.monotonic()
        for pid, running in self._running.items():
            if running.resume_at is not None and running.resume_at <= now:
                running.resume_at = None
                self._resume(pid, running)
        self._read_reports()
        if fault := self._watch.look({pid: run.name for pid, run in self._running.items()}):
            self.totals.faults.append(fault)
        if restart:
            taken = {running.place for running in self._running.values()}
            for place in set(range(self._processes)) - taken:
                self._start(place)

    def _changes(self) -> list[tuple[int, int]]:
        found = []
        for pid in list(self._running):
            changed, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if changed:
                found.append((pid, status))
        return found

    def _see(self, pid: int, status: int) -> None:
        running = self._running[pid]
        if os.WIFSTOPPED(status):
            self.totals.pauses += 1
            running.resume_at = time.monotonic() + running.life.pause_seconds
            return
        del self._running[pid]
        area = self._board.area(running.name)
        was_condemned = area.words[Area.FATE] == Fate.CONDEMNED
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and was_condemned:
            self.totals.kills += 1
        elif status == 0:
            self.totals.left += 1
        elif not os.WIFEXITED(status):
            self.totals.faults.append(
                f"worker {running.name:#x} ended by signal {os.WTERMSIG(status)}: {running.life}"
            )
        area.words[Area.FATE] = Fate.CONDEMNED
        area.words[Area.PORT] = 0
        self._count_lanes(area)
        self._board.words[running.place] = 0
        self._free_areas.append(running.name % AREAS)

    def _resume(self, pid: int, running: Running) -> None:
        if running.life.killed_in_pause:
            self._board.area(running.name).words[Area.FATE] = Fate.CONDEMNED
            os.kill(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGCONT)

    def _count_lanes(self, area: Area) -> None:
        for index in range(LANES):
            words = area.lane(index).words
            for counter, name in (
                (Lane.STEPS, "steps"),
                (Lane.BYTES, "bytes"),
                (Lane.SHARED, "shared"),
                (Lane.PLAIN, "plain"),
                (Lane.LOST, "lost"),
            ):
                self.totals.lanes[name] += words[counter]
        self._watch.count_gone(area)

    def _read_reports(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reports, 1 << 16):
                self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            report = json.loads(line)
            if report["kind"] == "fault":
                self.totals.faults.append(f"worker {report['worker']:#x}: {report['text']}")
            else:
                self.totals.notes[f"{report['kind']} {report['text']}"] += 1

    def _show(self, kills: int) -> None:
        if sys.stderr.isatty():
            print(
                f"\r{self.totals.kills} of {kills} kills, {len(self.totals.faults)} faults ",
                end="",
                file=sys.stderr,
                flush=True,
            )
