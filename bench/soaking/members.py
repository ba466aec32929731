"""The processes of a soak: told what to do and weighed by the one that started them."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass
class Tally:
    """What a process has done in a round."""

    sessions: int = 0
    shared: int = 0
    """Of them, those over shared memory."""
    bytes: int = 0
    """Received and compared."""
    round_trips: list[float] = field(default_factory=list)
    """Seconds."""


@dataclass
class Weight:
    """What a process holds when it has no session."""

    descriptors: int
    threads: int
    private: int
    """Bytes of memory that are no file's."""

    @classmethod
    def now(cls) -> "Weight":
        """Weigh the calling process."""
        gc.collect()
        words = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        return cls(
            descriptors=len(list(Path("/proc/self/fd").iterdir())) - 1,
            threads=int(words["Threads"]),
            private=1024 * int(words["RssAnon"].split()[0]),
        )


class Failed(Exception):
    """A process of the soak found something wrong, or does not answer."""


class Member:
    """A process that does ``work(*arguments, order)`` for each order it is given."""

    def __init__(self, name: str, prepare: Callable[..., Any], *arguments: object) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, prepare, arguments), name=name, daemon=True
        )
        self._process.start()
        theirs.close()

    def order(self, order: object) -> None:
        """Have it do something; ``answer`` is what came of it."""
        self._pipe.send(order)

    def answer(self, patience: float) -> Any:
        """Wait for what comes of the order; ``Failed`` if that is an error, or nothing in time."""
        if not self._pipe.poll(patience):
            self._show()
            raise Failed(f"{self.name} hangs: nothing for {patience:.0f} s; see above where")
        try:
            is_well, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"{self.name} ended by itself: {self._process.exitcode}") from None
        if not is_well:
            raise Failed(f"{self.name}: {value}")
        return value

    def _show(self) -> None:
        """Have it write where it is to standard error."""
        pid = self._process.pid
        if pid is not None:
            os.kill(pid, signal.SIGUSR1)
            self._process.join(1)

    def leave(self) -> None:
        """End it, by force if need be."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, prepare: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the one that started this
    with contextlib.suppress(EOFError), contextlib.ExitStack() as stack:
        try:
            work = stack.enter_context(prepare(*arguments))
            while (order := pipe.recv()) is not None:
                pipe.send((True, work(order)))
        except EOFError:
            raise
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            pipe.send((False, text))


def total(tallies: list[Tally]) -> Tally:
    """Return their sum; round trips are kept apart."""
    sums: Counter[str] = Counter()
    for tally in tallies:
        sums.update(sessions=tally.sessions, shared=tally.shared, bytes=tally.bytes)
    return Tally(sums["sessions"], sums["shared"], sums["bytes"])
