"""What it takes to give an ivshmem device to user space, as steps.

Each step is worked out when those before it are done, so it goes by what is so then; in a dry run
by what is so now.
"""

import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from ivsmc._cli import groups, pci, udev
from ivsmc._cli.machine import Machine, Refused
from ivsmc._cli.pci import PciDevice
from ivsmc._cli.steps import Step

__all__ = ["Wish", "bound", "spec", "unbound"]

_DRIVER = "vfio-pci"
_DRIVERS = "/sys/bus/pci/drivers"
_PROBE = "/sys/bus/pci/drivers_probe"
_NOIOMMU = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode"


@dataclass(frozen=True)
class Wish:
    """How a device is to be bound."""

    group: str | None = None
    """Group of users that may use it."""
    mode: int | None = None
    """Permissions."""
    persist: bool = False
    no_vfio: bool = False
    """As ``pci:``, also a doorbell device."""
    unsafe_noiommu: bool = False
    dry_run: bool = False

    @property
    def grant(self) -> udev.Grant:
        """Who may use it: 660 where a group is named and no permissions are."""
        mode = 0o660 if self.mode is None and self.group is not None else self.mode
        return udev.Grant(self.group, mode)


def spec(device: PciDevice) -> str:
    """Return the device spec that ``device`` has as it is now."""
    return f"{'vfio' if device.driver == _DRIVER else 'pci'}:{device.address}"


def bound(machine: Machine, device: PciDevice, wish: Wish) -> Iterator[Step]:
    """Yield what makes ``device`` usable."""
    if device.revision == 0:
        raise Refused(
            f"{device.address} has revision 0, of a QEMU before 2.6, which ivsmc does not support; "
            "use ivshmem-doorbell or ivshmem-plain of a newer one"
        )
    gid = _gid(wish.group)
    if device.has_doorbell and not wish.no_vfio:
        yield from _for_vfio(machine, device, wish, gid)
    else:
        yield from _for_sysfs(machine, device, wish, gid)


def unbound(machine: Machine, device: PciDevice) -> Iterator[Step]:
    """Yield what takes ``device`` back."""
    taken = device.driver == _DRIVER
    # The kernel would let `unbind` wait, deaf to signals, until the device is closed.
    if taken and device.node is not None and machine.is_busy(device.node):
        raise Refused(f"a process has {device.address} open; end it first: fuser -v {device.node}")
    rule = udev.path(device)
    if machine.exists(rule):
        yield Step(f"rm {rule}", machine.at(rule).unlink, _restore(machine, rule))
        yield from _reload(machine)
    override = f"{device.path}/driver_override"
    if machine.read(override) == _DRIVER:
        yield _echo(machine, "", override, undo=_DRIVER)
    if taken:
        driver = f"{_DRIVERS}/{_DRIVER}"
        yield Step(
            f"echo {device.address} > {driver}/unbind",
            lambda: machine.write(f"{driver}/unbind", device.address),
            lambda: machine.write(f"{driver}/bind", device.address),
        )
        yield _echo(machine, device.address, _PROBE)
        if device.is_noiommu and machine.read(_NOIOMMU) == "Y" and not _made_up_groups(machine):
            yield _echo(machine, "N", _NOIOMMU, undo="Y")
    yield from _closed(machine, device)


def _for_vfio(machine: Machine, device: PciDevice, wish: Wish, gid: int | None) -> Iterator[Step]:
    """Yield what makes a doorbell device usable through VFIO."""
    without_iommu = device.group is None or device.is_noiommu
    if device.group is None and not wish.unsafe_noiommu:
        _refuse_without_iommu(machine, device)
    if not without_iommu:
        _judge_group(machine, device)
    if not machine.exists(f"{_DRIVERS}/{_DRIVER}"):
        yield Step(f"modprobe {_DRIVER}", lambda: _load(machine))
    if device.driver != _DRIVER:
        yield from _taken(machine, device, wish)
    node = pci.describe(machine, device.address).node or "/dev/vfio/noiommu-N"
    if not wish.dry_run and not machine.exists(node):
        raise Refused(
            f"{device.address} is bound to {_DRIVER}, but there is no {node}: in a container, "
            "/dev/vfio must be given to it"
        )
    yield from _granted(machine, node, wish.grant, gid)
    if wish.persist:
        before = [f"echo Y > {_NOIOMMU}"] if without_iommu else []
        yield from _kept(machine, device, udev.vfio_rule(device, wish.grant, before))


def _taken(machine: Machine, device: PciDevice, wish: Wish) -> Iterator[Step]:
    """Yield what binds the device to vfio-pci."""
    if device.group is None:
        now = machine.read(_NOIOMMU)
        if now is None and (not wish.dry_run or machine.exists("/sys/module/vfio")):
            raise Refused(
                "this kernel has no VFIO without an IOMMU (CONFIG_VFIO_NOIOMMU; Debian's have "
                "not); give the VM an IOMMU: `ivsmc qemu-args`, on the host, prints the options"
            )
        if now != "Y":
            yield _echo(machine, "Y", _NOIOMMU, undo="N")
    if device.driver is not None:
        former = f"{_DRIVERS}/{device.driver}"
        yield Step(
            f"echo {device.address} > {former}/unbind",
            lambda: machine.write(f"{former}/unbind", device.address),
            lambda: machine.write(f"{former}/bind", device.address),
        )
    override = f"{device.path}/driver_override"
    before = machine.read(override)
    if before != _DRIVER:
        undo = "" if before in (None, "(null)") else before
        yield _echo(machine, _DRIVER, override, undo=undo)
    yield Step(
        f"echo {device.address} > {_PROBE}",
        lambda: _probe(machine, device),
        lambda: machine.write(f"{_DRIVERS}/{_DRIVER}/unbind", device.address),
    )


def _for_sysfs(machine: Machine, device: PciDevice, wish: Wish, gid: int | None) -> Iterator[Step]:
    """Yield what makes a device usable through its resource files."""
    if device.driver is not None:
        cure = (
            f"ivsmc unbind {device.address}"
            if device.driver == _DRIVER
            else f"echo {device.address} > {_DRIVERS}/{device.driver}/unbind"
        )
        raise Refused(
            f"{device.address} is an {device.model} device that the driver {device.driver} has; "
            f"unbind it: {cure}"
        )
    switch = f"{device.path}/enable"
    if machine.read(switch) == "0":  # not every firmware switches on what it does not use itself
        yield _echo(machine, "1", switch, undo="0")
    for path in device.resources:
        yield from _granted(machine, path, wish.grant, gid)
    if wish.persist:
        yield from _kept(machine, device, udev.sysfs_rule(device, wish.grant))


def _closed(machine: Machine, device: PciDevice) -> Iterator[Step]:
    """Yield what leaves the device's resource files to root, as the kernel made them."""
    owner = machine.at(device.path).stat().st_gid
    for path in device.resources:
        yield from _granted(machine, path, udev.Grant(str(owner), 0o600), owner)
    switch = f"{device.path}/enable"
    # It is a count of users; its memory the kernel does not switch off.
    if device.driver is None and machine.read(switch) not in (None, "0"):
        yield _echo(machine, "0", switch, undo="1")


def _made_up_groups(machine: Machine) -> list[str]:
    """Return the groups of devices that are bound without an IOMMU."""
    groups = "/sys/kernel/iommu_groups"
    names = machine.names(groups)
    return [name for name in names if machine.read(f"{groups}/{name}/name") == "vfio-noiommu"]


def _refuse_without_iommu(machine: Machine, device: PciDevice) -> NoReturn:
    lack, cure = pci.lack_of_iommu(machine)
    raise Refused(
        f"{device.address} is in no IOMMU group, without which VFIO is unsafe: {lack}; {cure}. "
        f"Or have it unbound, as pci:{device.address}, woken over TCP: --no-vfio; or bind it all "
        "the same: --unsafe-noiommu"
    )


def _judge_group(machine: Machine, device: PciDevice) -> None:
    """Refuse a group that VFIO would not open, because another driver holds a part of it."""
    for address, driver in pci.in_the_way(machine, device).items():
        raise Refused(
            f"IOMMU group {device.group} of {device.address} also holds {address}, which the "
            f"driver {driver} has; put the ivshmem device directly on the VM's pcie.0, or have it "
            f"unbound, as pci:{device.address}, woken over TCP: --no-vfio"
        )


def _load(machine: Machine) -> None:
    try:
        machine.modprobe(_DRIVER)
    except Refused as error:
        raise Refused(
            f"modprobe {_DRIVER}: {error}; install the kernel's modules (Ubuntu: linux-modules-"
            "extra-$(uname -r)), or a kernel with CONFIG_VFIO_PCI"
        ) from None


def _probe(machine: Machine, device: PciDevice) -> None:
    machine.write(_PROBE, device.address)
    driver = machine.target(f"{device.path}/driver")
    if driver != _DRIVER:
        raise Refused(
            f"{device.address} was not taken by {_DRIVER} but by {driver or 'no driver'}; the "
            "kernel's log says why: dmesg | tail"
        )


def _gid(group: str | None) -> int | None:
    # It comes to stand in udev's rules, in a shell command among others.
    if group is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", group):
        raise Refused(
            f"the group {group!r} has characters in its name that have a meaning in udev's rules; "
            "make one for this: groupadd --system ivsmc"
        )
    return None if group is None else groups.gid(group)


def _granted(machine: Machine, path: str, grant: udev.Grant, gid: int | None) -> Iterator[Step]:
    """Yield what sets who may use the file ``path``, which a dry run may not have yet."""
    file, mode = machine.at(path), grant.mode
    now = file.stat() if file.exists() else None
    if gid is not None and (now is None or now.st_gid != gid):
        yield Step(
            f"chgrp {grant.group} {path}",
            lambda: machine.chgrp(path, gid),
            None if now is None else lambda: machine.chgrp(path, now.st_gid),
        )
    if mode is not None and (now is None or stat.S_IMODE(now.st_mode) != mode):
        yield Step(
            f"chmod {mode:o} {path}",
            lambda: machine.chmod(path, mode),
            None if now is None else lambda: machine.chmod(path, stat.S_IMODE(now.st_mode)),
        )


def _kept(machine: Machine, device: PciDevice, text: str) -> Iterator[Step]:
    """Yield what writes the udev rule, if there is not the same already."""
    path = udev.path(device)
    file = machine.at(path)
    if not (file.is_file() and file.read_text() == text):
        yield Step(
            f"cat > {path} <<'END'\n{text}END",
            lambda: _create(machine, path, text),
            _restore(machine, path),
        )
        yield from _reload(machine)


def _create(machine: Machine, path: str, text: str) -> None:
    machine.at(path).parent.mkdir(parents=True, exist_ok=True)
    machine.at(path).write_text(text)


def _restore(machine: Machine, path: str) -> Callable[[], None]:
    """Return what puts the file back as it is now."""
    file = machine.at(path)
    if not file.exists():
        return lambda: file.unlink(missing_ok=True)
    text = file.read_text()
    return lambda: _create(machine, path, text)


def _reload(machine: Machine) -> Iterator[Step]:
    """Yield what tells udev, if it runs: by itself it looks only every few seconds."""
    if machine.exists("/run/udev/control"):
        yield Step("udevadm control --reload", machine.reload_udev)


def _echo(machine: Machine, text: str, path: str, *, undo: str | None = None) -> Step:
    return Step(
        f"echo {text} > {path}".replace("  ", " "),
        lambda: machine.write(path, f"{text}\n"),
        None if undo is None else lambda: machine.write(path, f"{undo}\n"),
    )
