"""The test bed: two guests, the host between them, and the ivshmem server that joins all three."""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vm import guest, tasks
from vm.guest import DOORBELL, PLAIN, Guest, Kernel
from vm.machine import Job, Machine, namespace

REGION_BYTES = 64 * 1024 * 1024
SHM = Path("/dev/shm")


@dataclass
class Bed:
    """All machines of the test bed, and what they share."""

    host: Machine
    guests: tuple[Guest, Guest]
    kernel: Kernel
    server: Path
    """Socket of the ivshmem server."""
    serving: Job
    """The ivshmem server itself."""
    memory: Path
    """File of the region that the guests have as ivshmem-plain."""

    def machine(self, name: str) -> Machine:
        """One of the three."""
        [found] = [each for each in (self.host, *self.guests) if each.name == name]
        return found

    def spec(self, machine: Machine, kind: str) -> str:
        """How ``machine`` reaches the region of the kind "doorbell" or "plain"."""
        if isinstance(machine, Guest):
            return f"vfio:{DOORBELL}" if kind == "doorbell" else f"pci:{PLAIN}"
        return f"host:{self.server}" if kind == "doorbell" else f"file:{self.memory}"

    def kill_server(self) -> None:
        """Kill the ivshmem server, and wait until the next one serves."""
        self.serving.send("kill")
        assert "listening" in self.serving.receive()

    def boot(self, machine: Guest) -> None:
        """Start a guest; its ``set_up`` waits until it is there."""
        machine.boot(self.kernel, self.server, self.memory)


@contextlib.contextmanager
def test_bed(kernel: Kernel) -> Iterator[Bed]:
    """All of it, up and idle."""
    with contextlib.ExitStack() as cleanup:
        directory = Path(tempfile.mkdtemp(prefix="ivsmc-vm-", dir=SHM))
        cleanup.callback(shutil.rmtree, directory)
        host = cleanup.enter_context(namespace("host", tasks.HOST_ADDRESS))
        guests = (Guest("one", host, 1, directory), Guest("two", host, 2, directory))
        host.call(tasks.set_up_network, [each.tap for each in guests])
        memory = directory / "plain"
        with memory.open("xb") as file:
            file.truncate(REGION_BYTES)
        server = directory / "ivs.sock"
        serving = cleanup.enter_context(_server(host, server))
        bed = Bed(host, guests, kernel, server, serving, memory)
        for each in guests:
            cleanup.callback(each.close)
            bed.boot(each)
        for each in guests:
            each.set_up()
        yield bed


@contextlib.contextmanager
def _server(host: Machine, path: Path) -> Iterator[Job]:
    """``ivsmc server --state`` in the host, at ``path``."""
    command = [sys.executable, "-m", "ivsmc", "server", str(path), "--size", str(REGION_BYTES)]
    command += ["--vectors", str(guest.VECTORS), "--state"]
    with host.running(tasks.run_server, command) as server:
        assert "listening" in server.receive()
        yield server
        server.send("stop")
        assert server.receive() == 0
