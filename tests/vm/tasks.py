"""What the machines of the test bed do: the host around the guests, and the guests."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
from pathlib import Path
from typing import IO

import ivsmc.__main__
from processes import Here
from told import client

BRIDGE = "ivsmc-test"
HOST_ADDRESS = "10.77.0.254"
PATIENCE = 300
"""Seconds of silence after which an ivshmem server is given up."""


def guest_address(number: int) -> str:
    return f"10.77.0.{number}"


def run(*command: str) -> str:
    """Run a command to its end; return what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def run_program(here: Here, command: list[str], log: str) -> int:
    """Run a command, what it says appended to ``log``; send its process id, return its status."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    here.send(process.pid)
    return process.wait()


def set_up_network(taps: list[str]) -> None:
    """Make the bridge that joins the guests and the host."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{HOST_ADDRESS}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for tap in taps:
        run("ip", "tuntap", "add", "dev", tap, "mode", "tap")
        run("ip", "link", "set", tap, "master", BRIDGE, "up")


def set_up_guest(address: str, devices: list[str]) -> None:
    """Give the guest its address, and its ivshmem devices to user space."""
    run("modprobe", "virtio_net")
    run("udevadm", "settle")  # it may give the interface another name
    [interface] = [path.name for path in Path("/sys/class/net").iterdir() if path.name != "lo"]
    run("ip", "address", "add", f"{address}/24", "dev", interface)
    run("ip", "link", "set", interface, "up")
    for device in devices:
        ivsmc_here("bind", device)


def ivsmc_here(*arguments: str) -> None:
    """Run a command of ivsmc in this process: a guest takes long to start another Python."""
    status = ivsmc.__main__.main([*arguments])
    assert status == 0, f"ivsmc {' '.join(arguments)}: {status}"


def run_server(here: Here, command: list[str]) -> int:
    """Run an ivshmem server until told to stop; send its first line, return its status.

    Told to kill, it kills the process that serves, and sends the first line of the next one.
    """
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        here.send(server.stderr.readline())
        # It says who comes and goes: read on, or it would wait for room in the pipe.
        said: queue.SimpleQueue[str] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(server.stderr, said))
        reader.start()
        while here.receive() == "kill":
            children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
            os.kill(int(children), signal.SIGKILL)
            while "listening" not in (line := said.get()):
                assert line, "the ivshmem server has ended"
            here.send(line)
        server.terminate()
        reader.join()
    return server.returncode


def _read(stream: IO[str], said: "queue.SimpleQueue[str]") -> None:
    for line in stream:
        said.put(line)
    said.put("")


def hold_ids(here: Here, path: Path, count: int) -> None:
    """Be ``count`` clients of an ivshmem server until told."""
    with contextlib.ExitStack() as clients:
        for _ in range(count):
            clients.enter_context(client(path, PATIENCE))
        here.send("there")
        here.receive()
