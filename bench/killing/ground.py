"""The device that a run is on, and what is counted on it before and after."""

import contextlib
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import ivsmc
from ivsmc import _native
from killing.timers import die_with_parent
from killing.worker import LOOPBACK

_LOOKS = 5000
"""Looks at the region, 2 ms apart, until it must be clean: ivshmem servers see leavers in time."""
_SHM = Path("/dev/shm")


@dataclass
class Ground:
    """A device, and what is not in its region but belongs to it."""

    spec: str
    where: Path
    server: int | None = None
    """The process id of the ivshmem server that was started for the run."""

    def server_descriptors(self) -> int:
        """Return how many files the ivshmem server has open; 0 without one."""
        if self.server is None:
            return 0
        return len(list(Path(f"/proc/{self.server}/fd").iterdir()))

    def files(self) -> set[str]:
        """Return the files that the device has made."""
        return {str(path) for path in self.where.rglob("*") if not path.is_dir()}


@contextlib.contextmanager
def ground(device: str, size: int) -> Iterator[Ground]:
    """Make what ``local``, ``file`` and ``host`` need, and remove it; other devices are there."""
    where = Path(tempfile.mkdtemp(prefix=f"ivsmc-kills-{os.getpid()}-", dir=_SHM))
    os.environ["IVSMC_LOCAL_DIR"] = str(where)
    os.environ["IVSMC_LOCAL_SIZE"] = str(size)
    try:
        match device:
            case "file":
                with (where / "region").open("xb") as file:
                    file.truncate(size)
                yield Ground(f"file:{where}/region", where)
            case "host":
                with _server(where / "ivs.sock", size) as pid:
                    yield Ground(f"host:{where}/ivs.sock", where, pid)
            case _:
                yield Ground(device, where)
    finally:
        shutil.rmtree(where)


@contextlib.contextmanager
def _server(path: Path, size: int) -> Iterator[int]:
    """Run an ivshmem server in a process of its own."""
    command = [sys.executable, "-m", "ivsmc", "server", str(path), "--size", str(size)]
    # To a file it can say who comes and goes without a thread here that reads it.
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stderr=log, preexec_fn=die_with_parent) as server,
    ):
        try:
            while "listening" not in Path(f"/proc/self/fd/{log.fileno()}").read_text():
                if server.poll() is not None:
                    break
                time.sleep(0.01)
            yield server.pid
        finally:
            server.terminate()
        if server.wait() != 0:
            log.seek(0)
            raise RuntimeError(f"the ivshmem server ended: {log.read()[-2000:]}")


class Observer:
    """A process that is attached from before the first worker until after the last.

    It is forked, as the workers are, so that the controller stays without threads and devices.
    """

    def __init__(self, device: str) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_observe, args=(theirs, device), daemon=True)
        self._process.start()
        theirs.close()
        self.before = self.now()

    def now(self) -> dict[str, int]:
        """Return what is in use in the region."""
        return self._ask(None)

    def after(self) -> dict[str, int]:
        """Return what is in use in the region, when nothing of it goes away any more."""
        return self.settled(self.before)

    def settled(self, expected: dict[str, int]) -> dict[str, int]:
        """Return the same as soon as it agrees with ``expected``, or does not for long."""
        return self._ask(expected)

    def leave(self) -> None:
        """Detach."""
        self._pipe.send("leave")
        self._process.join()
        self._pipe.close()

    def _ask(self, expected: dict[str, int] | None) -> dict[str, int]:
        self._pipe.send(expected)
        census: dict[str, int] = self._pipe.recv()
        return census


def _observe(pipe: Connection, device: str) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the controller
    with ivsmc.open_device(device) as opened:
        while (expected := pipe.recv()) != "leave":
            for _ in range(_LOOKS):
                opened.reap()
                census = opened.census()
                if expected is None or expected.items() <= census.items():
                    break
                select.select([], [], [], 0.002)
            pipe.send(census)
    # It ends without what a process does at its end, and may be the last one out.
    while not _native.shutdown():
        select.select([], [], [], 0.002)


@contextlib.contextmanager
def leak(device: str) -> Iterator[None]:
    """Hold a session that nobody ends, in a process, for a run that must find it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(theirs, device), daemon=True)
    process.start()
    ours.recv()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _hold(pipe: Connection, device: str) -> None:
    die_with_parent()
    with ivsmc.create_server((LOOPBACK, 0), device=device) as listener:
        session = ivsmc.create_connection(listener.getsockname(), device=device)
        pipe.send(session.transport)
        pipe.recv()
