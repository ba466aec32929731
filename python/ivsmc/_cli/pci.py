"""The ivshmem devices of a guest, as sysfs shows them."""

import re
from dataclasses import dataclass

from ivsmc._cli.machine import Machine, Refused

__all__ = [
    "DEVICES",
    "PciDevice",
    "describe",
    "find",
    "in_the_way",
    "is_open_to_vfio",
    "lack_of_iommu",
    "named",
    "neighbours",
]

DEVICES = "/sys/bus/pci/devices"
IVSHMEM = (0x1AF4, 0x1110)
"""Vendor and device number of every ivshmem device."""
_BRIDGE = 0x0604
"""PCI class of bridges: VFIO takes a group that has them, with their driver."""

_ADDRESS = re.compile(r"(?:(?:vfio|pci):)?(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])")


@dataclass(frozen=True)
class PciDevice:
    """One PCI device."""

    address: str
    """Such as ``0000:00:05.0``."""
    vendor: int
    device: int
    revision: int
    driver: str | None
    group: str | None
    """Number of the IOMMU group."""
    is_noiommu: bool
    """The group is one that VFIO made up because there is no IOMMU."""
    has_doorbell: bool
    """ivshmem-doorbell, not ivshmem-plain: it has a BAR1 for its interrupts."""
    size: int
    """Bytes of BAR2, the region."""
    vectors: int | None
    """Entries of its MSI-X table, its interrupts; None for those who may not look, as only root."""

    @property
    def path(self) -> str:
        """Its directory in sysfs."""
        return f"{DEVICES}/{self.address}"

    @property
    def is_ivshmem(self) -> bool:
        """Whether it is an ivshmem device."""
        return (self.vendor, self.device) == IVSHMEM

    @property
    def model(self) -> str:
        """QEMU's name for it."""
        return "ivshmem-doorbell" if self.has_doorbell else "ivshmem-plain"

    @property
    def resources(self) -> list[str]:
        """What processes open without VFIO: the region, and where there are doorbells those."""
        return [f"{self.path}/resource{bar}" for bar in ((2, 0) if self.has_doorbell else (2,))]

    @property
    def node(self) -> str | None:
        """What VFIO users open, if it is in a group."""
        if self.group is None:
            return None
        return f"/dev/vfio/{'noiommu-' if self.is_noiommu else ''}{self.group}"


def find(machine: Machine) -> list[PciDevice]:
    """Return the ivshmem devices there are."""
    devices = (describe(machine, address) for address in machine.names(DEVICES))
    return [device for device in devices if device.is_ivshmem]


def named(machine: Machine, text: str | None) -> PciDevice:
    """Return the ivshmem device at an address, or the only one there is.

    Raises ``Refused`` for anything else.
    """
    found = find(machine)
    there = ", ".join(device.address for device in found)
    if text is None:
        if len(found) == 1:
            return found[0]
        if found:
            raise Refused(f"this machine has several ivshmem devices; name one: {there}")
        raise Refused(
            "this machine has no ivshmem device (PCI 1af4:1110); give the VM one: "
            "`ivsmc qemu-args` and `ivsmc xml` print the options, on the host"
        )
    match = _ADDRESS.fullmatch(text.strip().lower())
    if match is None:
        raise Refused(f"{text!r} is no PCI address, such as 0000:00:05.0")
    address = f"{match[1] or '0000'}:{match[2]}"
    hint = f"; ivshmem devices here: {there}" if there else ""
    if not machine.exists(f"{DEVICES}/{address}"):
        raise Refused(f"this machine has no PCI device {address}{hint}")
    device = describe(machine, address)
    if not device.is_ivshmem:
        raise Refused(
            f"{address} is {device.vendor:04x}:{device.device:04x}, not an ivshmem device "
            f"(1af4:1110); it is left alone{hint}"
        )
    return device


def describe(machine: Machine, address: str) -> PciDevice:
    """Return what sysfs says about the device at ``address``."""
    path = f"{DEVICES}/{address}"
    bars = [_length(line) for line in (machine.read(f"{path}/resource") or "").splitlines()]
    bars += [0] * (3 - len(bars))
    return PciDevice(
        address=address,
        vendor=_number(machine, f"{path}/vendor"),
        device=_number(machine, f"{path}/device"),
        revision=_number(machine, f"{path}/revision"),
        driver=machine.target(f"{path}/driver"),
        group=machine.target(f"{path}/iommu_group"),
        is_noiommu=machine.read(f"{path}/iommu_group/name") == "vfio-noiommu",
        has_doorbell=bars[1] > 0,
        size=bars[2],
        vectors=_vectors(machine.read_bytes(f"{path}/config")),
    )


def neighbours(machine: Machine, device: PciDevice) -> dict[str, str | None]:
    """Return the others in the IOMMU group of ``device``, with their drivers."""
    return {
        address: machine.target(f"{DEVICES}/{address}/driver")
        for address in machine.names(f"/sys/kernel/iommu_groups/{device.group}/devices")
        if address != device.address
    }


def in_the_way(machine: Machine, device: PciDevice) -> dict[str, str]:
    """Return the neighbours because of which VFIO does not open the group, with their drivers."""
    return {
        address: driver
        for address, driver in neighbours(machine, device).items()
        if driver is not None
        and driver != "vfio-pci"
        and _number(machine, f"{DEVICES}/{address}/class") >> 8 != _BRIDGE
    }


def is_open_to_vfio(machine: Machine, device: PciDevice) -> bool:
    """Whether VFIO can open the device, once it is bound, with nothing unsafe."""
    return device.group is not None and not in_the_way(machine, device)


def lack_of_iommu(machine: Machine) -> tuple[str, str]:
    """Return why this VM's devices are in no IOMMU group, and what mends it."""
    if machine.exists("/sys/firmware/acpi/tables/DMAR"):
        return (
            "the VM has an Intel IOMMU that Linux does not use",
            "boot with intel_iommu=on (GRUB_CMDLINE_LINUX in /etc/default/grub)",
        )
    return (
        "the VM has no IOMMU",
        "start the VM with one (ivsmc qemu-args and ivsmc xml, on the host, print the options), "
        "and boot it with intel_iommu=on",
    )


def _vectors(config: bytes) -> int | None:
    """Return the entries of the MSI-X table by a configuration space (PCI 3.0, 6.7 and 6.8.2)."""
    at = config[0x34] & ~3 if len(config) > 0x34 else 0
    for _ in range(48):  # more do not fit: it goes in circles
        if at < 0x40 or at + 4 > len(config):
            break
        if config[at] == 0x11:
            return (int.from_bytes(config[at + 2 : at + 4], "little") & 0x7FF) + 1
        at = config[at + 1] & ~3
    return None


def _number(machine: Machine, path: str) -> int:
    try:
        return int(machine.read(path) or "", 16)
    except ValueError:
        return 0


def _length(line: str) -> int:
    """Bytes of a BAR, by its start, last byte and flags; all are 0 where there is none."""
    try:
        start, last, _ = (int(word, 16) for word in line.split())
    except ValueError:
        return 0
    return last - start + 1 if last else 0
