"""An agent over a stand-in for its device, and what the processes do that share it.

The agent is the real one, and so is its protocol. In place of the hardware there is a file, which
the crate's own tests make (``rust/ivsmc/src/agent/tests``): memory and registers are in it, and a
thread does what a store to the doorbell does.
"""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ivsmc
from doorbells import ask
from endpoints import LOOPBACK
from processes import Here
from random_stream import exchange
from tools import program

ROOT = Path(__file__).resolve().parent.parent
SERVES = "agent::tests::child_serves"
"""The part of the crate's test program that serves."""

NOBODY = 65534


@dataclass
class Status:
    """What an agent says of itself."""

    clients: int
    shared: int
    """Clients that share their vector."""
    died: int
    """Clients that ended without leaving."""
    doorbells: int
    open_files: int


class Agent:
    """An agent in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", directory: Path) -> None:
        self._process = process
        self.device = f"agent:{directory}/agent.sock"
        self.region = f"file:{directory}/region"
        """The same memory, without doorbells."""
        self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the agent has ended"
        return line

    def wait_ready(self) -> "Agent":
        """Wait until it listens."""
        while not self._line().startswith("serving"):
            pass
        return self

    def status(self) -> Status:
        """What it says of itself now."""
        assert self._process.stdin is not None
        self._process.stdin.write("status\n")
        self._process.stdin.flush()
        return Status(*map(int, self._line().split()))

    def kill(self) -> None:
        """SIGKILL it, and see it gone."""
        self._process.kill()
        self._process.wait()


@cache
def test_program() -> Path:
    """The test program of the crate, built if need be."""
    command = [program("cargo"), "test", "--locked", "--quiet", "--no-run"]
    built = subprocess.run(
        [*command, "--message-format=json"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("target", {}).get("name") == "ivsmc" and message.get("executable"):
            return Path(message["executable"])
    raise AssertionError("cargo made no test program of the crate ivsmc")


@contextlib.contextmanager
def running_agent(directory: Path, vectors: int) -> Iterator[Agent]:
    """An agent in ``directory``, whose device has so many vectors."""
    command = [str(test_program()), "--exact", SERVES, "--ignored", "--nocapture"]
    environment = {"AGENT_DIRECTORY": str(directory), "AGENT_VECTORS": str(vectors)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Agent(process, directory).wait_ready()
        finally:
            process.kill()


def open_as_nobody(_here: Here, device: str) -> set[str]:
    """Be an ordinary user, and say how ``device`` is refused, in whichever order the ends speak."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    said = set()
    for _ in range(50):
        try:
            ivsmc.open_device(device).close()
            said.add("opened")
        except ivsmc.DeviceError as error:
            said.add(str(error).replace(f"process {os.getpid()} ", ""))
    return said


def take_part(here: Here, device: str, total: int) -> list[dict[str, Any]]:
    """Listen, and say where; connect to the addresses told and accept as many as told.

    Then exchange ``total`` bytes with all of them at once; return the counters of the sessions.
    """
    with ivsmc.create_server(LOOPBACK, device=device) as listener, contextlib.ExitStack() as stack:
        here.send(listener.getsockname())
        addresses, accepted = here.receive()
        sessions = []
        failures: list[BaseException] = []

        def talk(session: ivsmc.Session, seeds: tuple[int, int]) -> None:
            try:
                exchange(session, *seeds, total)
            except BaseException as error:
                failures.append(error)

        threads = []
        for address in addresses:
            sessions.append(ivsmc.create_connection(address, device=device, require="smc"))
            threads.append(threading.Thread(target=talk, args=(sessions[-1], (1, 2))))
        for _ in range(accepted):
            session, _ = listener.accept()
            sessions.append(session)
            threads.append(threading.Thread(target=talk, args=(session, (2, 1))))
        for session in sessions:
            stack.enter_context(session)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert {session.transport for session in sessions} == {"smc"}
        return [session.stats() for session in sessions]


def stream_to(_here: Here, device: str, address: tuple[str, int], total: int) -> None:
    """Connect and exchange ``total`` bytes."""
    with ivsmc.create_connection(address, device=device, require="smc") as session:
        exchange(session, 1, 2, total)


def ask_when_told(here: Here, device: str, address: tuple[str, int]) -> dict[str, Any]:
    """Connect, and ask a question as often as told; return the counters, also when told "count"."""
    with ivsmc.create_connection(address, device=device, require="smc") as session:
        while told := here.receive():
            if told == "count":
                here.send(session.stats())
            else:
                ask(session, b"question")
                here.send("answered")
        return session.stats()


def echo(here: Here, device: str, count: int) -> None:
    """Accept sessions and send back what comes, each in a thread."""

    def answer(session: ivsmc.Session) -> None:
        with session:
            while data := session.recv(65536):
                session.sendall(data)

    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        here.send(listener.getsockname())
        threads = []
        for _ in range(count):
            session, _ = listener.accept()
            threads.append(threading.Thread(target=answer, args=(session,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
