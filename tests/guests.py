"""Machines made of a directory: their files, and what their kernel does when they are written.

What the kernel does here is what ``Documentation/ABI/testing/sysfs-bus-pci`` promises; the tests in
virtual machines run the same commands against a real one.
"""

import errno
import os
import struct
from pathlib import Path

from ivsmc._cli.machine import Machine, Refused
from ivsmc._cli.pci import DEVICES

DRIVERS = "/sys/bus/pci/drivers"
NOIOMMU = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"
MiB = 1 << 20


def configuration(numbers: tuple[int, int], vectors: int) -> bytes:
    """What root reads of a device: QEMU's, whose MSI-X capability comes first."""
    space = bytearray(256)
    struct.pack_into("<HH", space, 0, *numbers)
    if vectors:
        space[0x34] = 0x40
        struct.pack_into("<BBHII", space, 0x40, 0x11, 0, vectors - 1, 1, 0x801)
    return bytes(space)


class Guest(Machine):
    """A virtual machine with PCI devices."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.modules = {"vfio-pci"}
        """Which can be loaded."""
        self.busy: set[str] = set()
        """Device nodes that a process has open."""
        self.broken: set[str] = set()
        """Files that fail when written."""
        self.programs: dict[str, dict[str, str]] = {}
        """Which are installed, with what they print for each first argument."""
        self.reloads = 0
        """How often udev was told to read its rules."""
        self.root_runs = True
        """Root has started the command."""
        self.make("/sys/bus/pci/drivers_probe")
        self.at(DRIVERS).mkdir(parents=True)

    def make(self, path: str, text: str = "") -> None:
        """Make a file."""
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_text(text)

    def link(self, path: str, to: str) -> None:
        """Make a symbolic link; ``to`` is a path of this machine."""
        self.at(to).mkdir(parents=True, exist_ok=True)
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).symlink_to(self.at(to))

    def add(
        self,
        address: str = "0000:00:05.0",
        *,
        numbers: tuple[int, int] = (0x1AF4, 0x1110),
        revision: int = 1,
        kind: int = 0x050000,
        doorbell: bool = True,
        size: int = 64 * MiB,
        group: str | None = "3",
        driver: str | None = None,
        vectors: int = 2,
    ) -> str:
        """Plug a device in, an ivshmem-doorbell device unless told otherwise; return its path."""
        path = f"{DEVICES}/{address}"
        self.make(f"{path}/vendor", f"0x{numbers[0]:04x}\n")
        self.make(f"{path}/device", f"0x{numbers[1]:04x}\n")
        self.make(f"{path}/revision", f"0x{revision:02x}\n")
        self.make(f"{path}/class", f"0x{kind:06x}\n")
        self.at(f"{path}/config").write_bytes(configuration(numbers, vectors if doorbell else 0))
        self.make(f"{path}/driver_override", "(null)\n")
        self.make(f"{path}/enable", "0\n")
        for bar in (0, 2):
            self.make(f"{path}/resource{bar}")
            self.at(f"{path}/resource{bar}").chmod(0o600)
        bars = [(0xFEBF1000, 256), (0xFEBF2000, 4096 if doorbell else 0), (0xFE0000000, size)]
        lines = [
            f"0x{start:016x} 0x{start + length - 1:016x} 0x{0x40200:016x}"
            if length
            else " ".join(["0x" + "0" * 16] * 3)
            for start, length in bars
        ]
        self.make(f"{path}/resource", "\n".join(lines) + "\n")
        if group is not None:
            self._join(address, group)
        if driver is not None:
            self.has_driver(driver)
            self._bind(address, driver)
        return path

    def has_driver(self, driver: str) -> None:
        """A driver is loaded."""
        self.at(f"{DRIVERS}/{driver}").mkdir(exist_ok=True)
        for name in ("bind", "unbind"):
            self.make(f"{DRIVERS}/{driver}/{name}")

    def snapshot(self) -> dict[str, tuple[int, int, str]]:
        """All files and links: permissions, groups and contents, but for what is only written."""
        found = {}
        for file in sorted(self.root.rglob("*")):
            name = str(file.relative_to(self.root))
            if file.is_symlink():
                found[name] = (0, 0, str(file.readlink()))
            elif file.is_file() and file.name not in ("bind", "unbind", "drivers_probe"):
                status = file.stat()
                found[name] = (status.st_mode, status.st_gid, file.read_text("latin-1"))
        return found

    def write(self, path: str, text: str) -> None:
        self._judge(path)
        super().write(path, text)
        text, name = text.strip(), Path(path).name
        if name == "driver_override":
            self.make(path, f"{text or '(null)'}\n")
        elif name in ("enable", "enable_unsafe_noiommu_mode"):
            self.make(path, f"{text}\n")
        elif name == "drivers_probe":
            wanted = self.read(f"{DEVICES}/{text}/driver_override")
            if wanted and self.exists(f"{DRIVERS}/{wanted}"):
                self._bind(text, wanted)
        elif name == "bind":
            self._bind(text, Path(path).parent.name)
        elif name == "unbind":
            self._unbind(text)

    def chmod(self, path: str, mode: int) -> None:
        self._judge(path)
        super().chmod(path, mode)

    def modprobe(self, module: str) -> None:
        if module not in self.modules:
            raise Refused(f"FATAL: Module {module} not found in directory /lib/modules/6.1")
        self.has_driver(module)

    def is_root(self) -> bool:
        return self.root_runs

    def is_busy(self, path: str) -> bool:
        return path in self.busy

    def reload_udev(self) -> None:
        self.reloads += 1

    def find(self, program: str) -> str | None:
        return f"/usr/bin/{program}" if program in self.programs else None

    def run(self, program: str, *arguments: str) -> str:
        return self.programs[program][arguments[0]]

    def _judge(self, path: str) -> None:
        if path in self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    def _join(self, address: str, group: str, name: str = "DMA") -> None:
        at = f"/sys/kernel/iommu_groups/{group}"
        self.link(f"{DEVICES}/{address}/iommu_group", at)
        self.link(f"{at}/devices/{address}", f"{DEVICES}/{address}")
        self.make(f"{at}/name", f"{name}\n")

    def _bind(self, address: str, driver: str) -> None:
        if self.target(f"{DEVICES}/{address}/driver"):
            return
        group = self.target(f"{DEVICES}/{address}/iommu_group")
        if driver == "vfio-pci":
            if group is None:
                if self.read(NOIOMMU) != "Y":
                    return  # probe fails, and the kernel's log says so
                taken = self.names("/sys/kernel/iommu_groups")
                group = next(str(n) for n in range(len(taken) + 1) if str(n) not in taken)
                self._join(address, group, "vfio-noiommu")
            made_up = self.read(f"/sys/kernel/iommu_groups/{group}/name") == "vfio-noiommu"
            node = f"/dev/vfio/{'noiommu-' if made_up else ''}{group}"
            self.make(node)
            self.at(node).chmod(0o600)
        self.link(f"{DEVICES}/{address}/driver", f"{DRIVERS}/{driver}")

    def _unbind(self, address: str) -> None:
        self.at(f"{DEVICES}/{address}/driver").unlink()
        group = self.target(f"{DEVICES}/{address}/iommu_group")
        self.at(f"/dev/vfio/{group}").unlink(missing_ok=True)
        node = self.at(f"/dev/vfio/noiommu-{group}")
        if node.exists():  # the group was made up for the driver, and goes with it
            node.unlink()
            self.at(f"{DEVICES}/{address}/iommu_group").unlink()
            group_path = self.at(f"/sys/kernel/iommu_groups/{group}")
            (group_path / "devices" / address).unlink()
            (group_path / "name").unlink()
            (group_path / "devices").rmdir()
            group_path.rmdir()
