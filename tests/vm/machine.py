"""A machine that runs functions of the tests: a guest, or the host in the guests' network."""

import contextlib
import itertools
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from processes import Here
from vm.frames import Decoder, Kind, encode

AGENT = Path(__file__).with_name("agent.py")
PATIENCE = 300
"""Seconds after which a machine that says nothing is given up; no promise is measured with it."""


class MachineGoneError(ConnectionError):
    """The machine has ended, or begun anew, and the job with it."""


class Job:
    """A function that runs in a machine; as ``processes.Remote``."""

    def __init__(self, machine: "Machine", number: int) -> None:
        self._machine = machine
        self._number = number
        self.events: queue.SimpleQueue[bytes | int | None] = queue.SimpleQueue()
        """Pickled values; at last the exit status, or None if the machine was gone before."""
        self.status: int | None = None
        self.gone = False

    def receive(self) -> Any:
        """What it sends next; fails with its traceback if it failed."""
        body = self._next()
        if isinstance(body, int):
            raise AssertionError(f"a job in {self._machine.name} ended with status {body}")
        kind, value = pickle.loads(body)
        assert kind != "failed", f"in {self._machine.name}:\n{value}"
        return value

    def send(self, value: object) -> None:
        """Give it ``value``."""
        self._machine.send(Kind.DATA, self._number, pickle.dumps(value))

    def kill(self) -> None:
        """SIGKILL it and its children, and see it gone."""
        self._machine.send(Kind.KILL, self._number)
        assert self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Its exit status; what it sends before is dropped."""
        while self.status is None:
            self._next()
        return self.status

    def _next(self) -> bytes | int:
        if self.gone:
            raise MachineGoneError(self._machine.name)
        try:
            event = self.events.get(timeout=PATIENCE)
        except queue.Empty:
            raise TimeoutError(f"{self._machine.name} says nothing") from None
        if event is None:
            self.gone = True
            raise MachineGoneError(self._machine.name)
        if isinstance(event, int):
            self.status = event
        return event


class Machine:
    """Runs jobs through the agent at the other end of ``channel``."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._channel: socket.socket | None = None
        self._reader: threading.Thread | None = None
        self._ready = threading.Event()

    def attach(self, channel: socket.socket) -> None:
        """Take ``channel``, to an agent that runs or will."""
        self.detach()
        self._channel = channel
        self._ready.clear()
        self._reader = threading.Thread(target=self._read, args=(channel,), daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        """Wait until the agent runs."""
        if not self._ready.wait(PATIENCE):
            raise TimeoutError(f"the agent of {self.name} does not start")

    def detach(self) -> None:
        """Give the channel up, and the jobs with it."""
        if self._channel is not None and self._reader is not None:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)
            self._reader.join()
            self._channel.close()
            self._channel = self._reader = None

    def send(self, kind: Kind, job: int, body: bytes = b"") -> None:
        """Send the agent a frame."""
        if self._channel is None:
            raise MachineGoneError(self.name)
        try:
            self._channel.sendall(encode(kind, job, body))
        except OSError as error:
            raise MachineGoneError(self.name) from error

    @contextlib.contextmanager
    def running(self, function: Callable[..., Any], *arguments: object) -> Iterator[Job]:
        """Run ``function(here, *arguments)`` in the machine; its result is sent last."""
        number = next(self._numbers)
        job = self.jobs[number] = Job(self, number)
        try:
            self.send(Kind.START, number, pickle.dumps((function, arguments)))
        except MachineGoneError:
            del self.jobs[number]
            raise
        try:
            yield job
        except BaseException:
            with contextlib.suppress(MachineGoneError):
                if job.status is None:
                    self.send(Kind.KILL, number)
            raise
        finally:
            with contextlib.suppress(MachineGoneError):
                job.wait()
            del self.jobs[number]

    def call(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Run ``function(*arguments)`` in the machine; return what it returns."""
        with self.running(_plainly, function, *arguments) as job:
            return job.receive()

    def _read(self, channel: socket.socket) -> None:
        decoder = Decoder()
        with contextlib.suppress(OSError):
            while data := channel.recv(65536):
                for kind, number, body in decoder.feed(data):
                    job = self.jobs.get(number)
                    if kind is Kind.READY:
                        self._ready.set()
                    elif job is not None:
                        job.events.put(int(body) if kind is Kind.EXITED else body)
        for job in list(self.jobs.values()):
            job.events.put(None)


def _plainly(_here: Here, function: Callable[..., Any], *arguments: object) -> Any:
    return function(*arguments)


@contextlib.contextmanager
def namespace(name: str, address: str) -> Iterator[Machine]:
    """The host, with a network and a table of processes of its own.

    All that runs there ends with its agent, which ends with this process, however that ends;
    the interfaces made there go with the last of them.
    """
    ours, theirs = socket.socketpair()
    command = ["unshare", "--net", "--pid", "--fork", "--mount-proc"]
    command += [sys.executable, "-B", str(AGENT), str(theirs.fileno())]
    process = subprocess.Popen(
        command,
        env=agent_environment(),
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
    theirs.close()
    machine = Machine(name, address)
    try:
        machine.attach(ours)
        machine.wait_ready()
        yield machine
    finally:
        machine.detach()
        process.wait()


def agent_environment() -> dict[str, str]:
    """What the agent needs to find the tests' modules, and ivsmc where pytest finds it."""
    paths = [str(AGENT.parent.parent)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    passed_on = {name: os.environ[name] for name in ("PATH", "IVSMC_MATCH_MS")}
    return {"PYTHONPATH": os.pathsep.join(paths), **passed_on}
