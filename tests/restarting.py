"""An ivshmem server that is killed again and again, and what its clients do meanwhile."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import ivsmc
from conftest import REGION_BYTES
from crowd import PATIENCE
from endpoints import LOOPBACK, receive_exactly
from processes import Here
from random_stream import RandomStream
from told import NotServedError, client

LARGEST = 20_000
"""Bytes of the largest question."""
TRIES = int(PATIENCE * 1000)
"""Looks of one wait, of a millisecond each."""


class KeptServer:
    """``ivsmc server --state`` and the process in which it serves."""

    def __init__(self, path: Path, keeper: subprocess.Popen[str]) -> None:
        self.path = path
        self.keeper = keeper
        self.said: list[str] = []

    def serving(self) -> int:
        """The process that serves, or is about to."""
        children = Path(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children")
        for _ in range(TRIES):
            if found := children.read_text().split():
                return int(found[0])
            time.sleep(0.001)
        raise AssertionError("nobody serves")

    def starts(self) -> int:
        """How often one has begun to listen."""
        return sum("listening" in line for line in self.said)

    def until_started(self, starts: int) -> None:
        """Wait until one has begun to listen for the ``starts``-th time."""
        for _ in range(TRIES):
            if self.starts() >= starts:
                return
            time.sleep(0.001)
        raise AssertionError(self.said)

    def until_said(self, words: str) -> None:
        """Wait until it has said ``words``."""
        for _ in range(TRIES):
            if any(words in line for line in self.said):
                return
            time.sleep(0.001)
        raise AssertionError(self.said)

    def strike(self, number: int) -> None:
        """Send the process that serves a signal that ends it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.serving(), number)

    def replace(self) -> None:
        """Kill the process that serves, and wait for another one."""
        before = self.serving()
        self.strike(signal.SIGKILL)
        for _ in range(TRIES):
            if self.serving() != before:
                return
            time.sleep(0.001)
        raise AssertionError("nobody replaces it")

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Have nobody serve for a while."""
        os.kill(self.keeper.pid, signal.SIGSTOP)
        _until(self.keeper.pid, "T")
        serving = self.serving()
        os.kill(serving, signal.SIGKILL)
        _until(serving, "Z")
        starts = self.starts()
        yield
        assert self.starts() == starts
        os.kill(self.keeper.pid, signal.SIGCONT)
        self.until_started(starts + 1)

    def descriptors(self) -> tuple[int, int]:
        """How many descriptors keeper and server have open."""
        first, second = (
            len(list(Path(f"/proc/{pid}/fd").iterdir()))
            for pid in (self.keeper.pid, self.serving())
        )
        return first, second


def _until(pid: int, state: str) -> None:
    for _ in range(TRIES):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == state:
            return
        time.sleep(0.001)
    raise AssertionError(f"{pid} is not {state}")


@contextlib.contextmanager
def kept_server(
    path: Path,
    *options: str,
    limit: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[KeptServer]:
    """``ivsmc server --state`` at ``path``, with ``limit`` descriptors; ended properly at last."""
    command = [sys.executable, "-m", "ivsmc", "server", str(path), "--size", str(REGION_BYTES)]
    command += ["--state", *options]
    if limit is not None:
        command = ["/bin/sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *command]
    every = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=every) as keeper:
        assert keeper.stderr is not None
        server = KeptServer(path, keeper)
        try:
            server.said.append(keeper.stderr.readline())
            assert "listening" in server.said[0], server.said[0] + keeper.stderr.read()
            reader = threading.Thread(target=server.said.extend, args=(keeper.stderr,))
            reader.start()
            yield server
        finally:
            keeper.terminate()
            keeper.send_signal(signal.SIGCONT)
        reader.join()
    assert keeper.returncode == 0, server.said
    assert not path.exists()


def answer(here: Here, device: str, count: int) -> list[dict[str, int]]:
    """Accept ``count`` sessions, send back what comes; at the end their counters."""
    os.environ["IVSMC_SPIN_US"] = "0"
    with ivsmc.create_server(LOOPBACK, device=device, backlog=count) as listener:
        here.send(listener.getsockname())
        sessions = []
        threads = []
        for _ in range(count):
            session, _ = listener.accept()
            sessions.append(session)
            threads.append(threading.Thread(target=_echo, args=(session,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        stats = [session.stats() for session in sessions]
        for session in sessions:
            session.close()
        return stats


def _echo(session: ivsmc.Session) -> None:
    while data := session.recv(65536):
        session.sendall(data)


def ask_until_told(
    here: Here, device: str, address: tuple[str, int], seed: int
) -> tuple[int, bool, dict[str, int]]:
    """Ask and check the answers, asleep in between.

    How often, whether it could be woken by doorbell, and the counters.
    """
    os.environ["IVSMC_SPIN_US"] = "0"
    has_doorbell = _attach(device)
    data = RandomStream(seed)
    rounds = 0
    with ivsmc.create_connection(address, device=device, require="smc") as session:
        session.settimeout(PATIENCE)
        here.send("asks")
        while not select.select([here], [], [], 0)[0]:
            question = data.take(data.piece_size(LARGEST))
            session.sendall(question)
            assert receive_exactly(session, len(question)) == question
            rounds += 1
        session.shutdown(2)
        return rounds, has_doorbell, session.stats()


def _attach(device: str) -> bool:
    """Join the region; the ivshmem server may be about to come back.

    Whether it has a doorbell: that is not waited for as long as it may take on a loaded machine.
    """
    for _ in range(TRIES):
        with contextlib.suppress(ivsmc.DeviceError):
            return ivsmc.open_device(device).stats()["vector"] is not None
        time.sleep(0.001)
    raise AssertionError("it cannot join")


def come_and_go(here: Here, path: Path) -> dict[int, list[int]]:
    """Join and leave until told; the eventfds of each id, which never change."""
    eventfds: dict[int, list[int]] = {}
    here.send("comes")
    while not select.select([here], [], [], 0)[0]:
        for _ in range(TRIES):
            # Killed just when it had accepted: that is all that may be lost.
            with contextlib.suppress(NotServedError), client(path, PATIENCE) as joined:
                joined.take_all()
                break
        merge(eventfds, joined.eventfds)
    return eventfds


def merge(known: dict[int, list[int]], told: dict[int, list[int]]) -> None:
    """Add what was ``told`` to what is ``known``, and see that it is the same as far as it goes."""
    for peer, numbers in told.items():
        before = known.setdefault(peer, numbers)
        assert all(one == other for one, other in zip(before, numbers, strict=False)), peer
        known[peer] = max(before, numbers, key=len)
