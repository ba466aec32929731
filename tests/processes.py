"""Other processes for tests: a function of an importable module, run with one end of a pipe."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any


class Remote:
    """A function running in a process of its own."""

    def __init__(self, pipe: Connection, process: Any) -> None:
        self.pipe = pipe
        self.process = process

    def receive(self) -> Any:
        """What it sends next; fails with its traceback if it failed."""
        kind, value = self.pipe.recv()
        assert kind != "failed", value
        return value

    def send(self, value: object) -> None:
        """Give it ``value``."""
        self.pipe.send(value)

    def kill(self) -> None:
        """SIGKILL it, and see it gone."""
        self.process.kill()
        self.process.join()


class Here:
    """The other end, in that process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, value: object) -> None:
        self._pipe.send(("value", value))

    def receive(self) -> Any:
        return self._pipe.recv()

    def fileno(self) -> int:
        """Readable while there is something to receive."""
        return self._pipe.fileno()


@contextlib.contextmanager
def running(function: Callable[..., Any], *arguments: object) -> Iterator[Remote]:
    """Run ``function(here, *arguments)`` in a process made anew; its result is sent last."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Remote(ours, process)
    except BaseException:
        process.kill()
        raise
    finally:
        ours.close()
        process.join()
        process.close()


def serve(pipe: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    """Run ``function`` at this end of ``pipe``; at the other is a ``Remote``."""
    try:
        pipe.send(("value", function(Here(pipe), *arguments)))
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send(("failed", traceback.format_exc()))
        raise
