"""A guest: QEMU with this host's file system, read-only, as its own, booted by virtme-ng."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path

from vm import tasks
from vm.machine import AGENT, PATIENCE, Job, Machine, agent_environment
from vm.qmp import Qmp

DOORBELL = "0000:00:10.0"
"""Where a guest has its ivshmem-doorbell device."""
PLAIN = "0000:00:11.0"
"""Where a guest has its ivshmem-plain device."""
VECTORS = 4
TOOLS = ["qemu-system-x86_64", "ip", "unshare", "modprobe", "depmod", "udevadm", "busybox", "lspci"]


@dataclass(frozen=True)
class Kernel:
    """A kernel image, with its modules below the same root."""

    image: Path
    modules: Path


def find_kernel() -> Kernel | None:
    """The kernel that IVSMC_VM_KERNEL names, or the newest installed one that has all we need."""
    if named := os.environ.get("IVSMC_VM_KERNEL"):
        candidates = [Path(named)]
    else:
        images = Path("/boot").glob("vmlinuz-*")
        candidates = sorted(images, key=lambda path: _numbers(path.name), reverse=True)
    for image in candidates:
        version = image.name.removeprefix("vmlinuz-")
        modules = image.parent.parent / "lib/modules" / version
        needed = ["fs/9p/9p.ko*", "drivers/vfio/pci/vfio-pci.ko*", "drivers/net/virtio_net.ko*"]
        if all(any((modules / "kernel").glob(name)) for name in needed):
            return Kernel(image, modules)
    return None


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def missing() -> str | None:
    """Why guests cannot run here, or None."""
    if os.geteuid() != 0:
        return "only root can make the guests' network"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(absent)}"
    try:
        import virtme  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return "virtme-ng is not installed in this Python"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "no /dev/net/tun"
    if find_kernel() is None:
        return "no kernel with 9p, vfio-pci and virtio_net modules: linux-image-amd64 has them"
    return None


class Guest(Machine):
    """One guest of the test bed; it can be booted, reset, paused, killed, and booted again."""

    def __init__(self, name: str, host: Machine, number: int, directory: Path) -> None:
        super().__init__(name, tasks.guest_address(number))
        self.tap = f"tap-{name}"
        self.pid = 0
        """Of its QEMU."""
        self._number = number
        self._host = host
        self._directory = directory
        self._cleanup = contextlib.ExitStack()
        self._qmp: Qmp | None = None
        self._qemu: Job | None = None
        self._log = directory / f"{name}.log"

    @property
    def is_up(self) -> bool:
        """Whether it has been booted and not been killed since."""
        return self._qmp is not None

    @property
    def qmp(self) -> Qmp:
        assert self._qmp is not None, f"{self.name} does not run"
        return self._qmp

    def boot(self, kernel: Kernel, server: Path, memory: Path) -> None:
        """Start QEMU, a client of the ivshmem server ``server``; ``memory`` is the plain region."""
        qmp_path = self._directory / f"{self.name}.qmp"
        command = self._command(kernel, qmp_path, server, memory)
        with socket.socket(socket.AF_UNIX) as listener:
            qmp_path.unlink(missing_ok=True)
            listener.bind(str(qmp_path))
            listener.listen()
            running = self._host.running(tasks.run_program, command, str(self._log))
            self._qemu = self._cleanup.enter_context(running)
            self._qemu.receive()
            connection = self._accept(listener)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        self.pid, *_ = struct.unpack("iII", credentials)
        self._qmp = Qmp(connection)
        self._cleanup.callback(self._qmp.close)
        self._attach_port()

    def _command(self, kernel: Kernel, qmp: Path, server: Path, memory: Path) -> list[str]:
        virtme = [sys.executable, "-m", "virtme.commands.run", "--kimg", str(kernel.image)]
        virtme += ["--mods", "auto", "--disable-kvm", "--disable-microvm", "--force-9p"]
        virtme += ["--cpus", "1", "--memory", "512M", "--name", self.name, "--show-boot-console"]
        # As under KVM, where Linux knows by itself that ticks may come late: with an IOMMU that
        # remaps interrupts it would else take them for broken, and panic.
        virtme += ["-a", "intel_iommu=on", "-a", "no_timer_check"]
        if not Path("/lib/modules").exists():  # virtme-ng needs it, to put the modules there
            virtme += ["--overlay-rwdir", "/lib"]
        environment = " ".join(f"{k}={shlex.quote(v)}" for k, v in agent_environment().items())
        python = shlex.join([sys.executable, "-B", str(AGENT)])
        port = "/dev/virtio-ports/ivsmc.agent"
        virtme += ["--script-sh", f"exec env {environment} {python} {port}"]
        identity = uuid.uuid5(uuid.NAMESPACE_DNS, f"{self.name}.ivsmc.test")
        qemu = f"""
            -action reboot=reset
            -chardev socket,id=qmp,path={qmp} -mon chardev=qmp,mode=control
            -chardev socket,id=agent,path={self._port_path},server=on,wait=off
            -device virtio-serial-pci -device virtserialport,chardev=agent,name=ivsmc.agent
            -netdev tap,id=net,ifname={self.tap},script=no,downscript=no
            -device virtio-net-pci,netdev=net,mac=52:54:00:00:00:{self._number:02x}
        """
        options = self._ivshmem(DOORBELL, "--socket", str(server), "--uuid", str(identity))
        options += self._ivshmem(PLAIN, "--file", str(memory), "--name", "ivsmc1")
        return [*virtme, "--qemu-opts", *options, *qemu.split()]

    def _ivshmem(self, place: str, *region: str) -> list[str]:
        """What ``ivsmc qemu-args`` says for a region, with the place of its device."""
        command = [sys.executable, "-m", "ivsmc", "qemu-args", "--json", "--accel", "tcg", *region]
        said: list[str] = json.loads(self._host.call(tasks.run, *command))["arguments"]
        assert said[-2] == "-device"
        return [*said[:-1], f"{said[-1]},addr={_slot(place)}"]

    @property
    def _port_path(self) -> Path:
        return self._directory / f"{self.name}.port"

    def _accept(self, listener: socket.socket) -> socket.socket:
        """The connection that QEMU makes, if it does not end before."""
        assert self._qemu is not None
        listener.settimeout(0.5)
        for _ in range(2 * PATIENCE):
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(PATIENCE)
                return connection
            assert self._qemu.events.empty(), f"QEMU has ended:\n{self._log.read_text()}"
        raise TimeoutError("QEMU does not start")

    def _attach_port(self) -> None:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(str(self._port_path))
        self.attach(channel)

    def set_up(self) -> None:
        """Wait until it has booted; give it its address."""
        try:
            self.wait_ready()
            self.call(tasks.set_up_guest, self.address, [DOORBELL, PLAIN])
        except BaseException as error:
            error.add_note(f"{self._log}:\n{self._log.read_text()}")
            raise

    def reset(self) -> None:
        """Press its reset button; ``set_up`` waits until it is back."""
        self.qmp.execute("system_reset")
        self.qmp.wait("RESET")
        self.detach()  # with it goes what has not been read of the old agent's
        self._attach_port()

    def pause(self) -> None:
        self.qmp.execute("stop")

    def resume(self) -> None:
        self.qmp.execute("cont")

    def kill(self) -> None:
        """SIGKILL its QEMU and see it gone; it can be booted again then."""
        os.kill(self.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End it, if it has not ended."""
        if self._qmp is not None:
            with contextlib.suppress(ConnectionError):
                self._qmp.execute("quit")
        self.detach()
        self._qmp = self._qemu = None
        self._cleanup.close()


def _slot(address: str) -> str:
    return address.split(":")[-1].split(".")[0]
