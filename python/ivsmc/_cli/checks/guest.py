"""Checks of a VM: its ivshmem devices and the way to them."""

import socket
from collections.abc import Iterator

from ivsmc._cli import pci
from ivsmc._cli.checks.finding import Finding, Scene, note, ok, wrong


def present(scene: Scene) -> Iterator[Finding]:
    """Look for devices of a revision that works, one of them with doorbells."""
    for device in scene.ivshmem:
        title = (
            f"{device.address} is {device.model}, revision {device.revision}, "
            f"region of {device.size >> 20} MiB"
        )
        if device.vectors is not None:
            title += f", {device.vectors} vector{'' if device.vectors == 1 else 's'}"
        if device.revision == 0:
            yield wrong(
                f"{title}: of a QEMU before 2.6, which ivsmc does not support",
                "start the VM with a newer QEMU: ivsmc qemu-args prints the options, on the host",
            )
        else:
            yield ok(title)
    if scene.ivshmem and not any(device.has_doorbell for device in scene.ivshmem):
        yield scene.if_guest(
            "no ivshmem-doorbell device: sessions wait without doorbells, woken over TCP",
            "start the VM with one of an ivshmem server: ivsmc qemu-args (or ivsmc xml), on the "
            "host",
        )
    if not scene.ivshmem:
        yield scene.if_guest(
            "no ivshmem device: this is no VM with a region",
            "start the VM with one: ivsmc qemu-args (or ivsmc xml), on the host",
        )


def driver(scene: Scene) -> Iterator[Finding]:
    """Ask that doorbell devices are bound to vfio-pci, and plain ones to nothing."""
    for device in scene.ivshmem:
        bind = f"ivsmc bind {device.address}"
        if device.driver == "vfio-pci":
            yield ok(f"{device.address} is bound to vfio-pci")
        elif device.has_doorbell:
            has = f"the driver {device.driver}" if device.driver else "no driver"
            yield scene.if_guest(
                f"{device.address} has {has}: it is used without doorbells, woken over TCP",
                bind
                if pci.is_open_to_vfio(scene.machine, device)
                else f"mend its IOMMU group, see below; then: {bind}",
            )
        elif device.driver:
            yield wrong(
                f"{device.address} is ivshmem-plain and the driver {device.driver} has it",
                f"echo {device.address} > /sys/bus/pci/drivers/{device.driver}/unbind",
            )
        else:
            yield ok(f"{device.address} has no driver and, being ivshmem-plain, needs none")


def iommu(scene: Scene) -> Iterator[Finding]:
    """Ask that doorbell devices are in an IOMMU group that VFIO opens."""
    machine = scene.machine
    for device in scene.ivshmem:
        if not device.has_doorbell:
            continue
        if device.group is None:
            lack, cure = pci.lack_of_iommu(machine)
            yield scene.if_guest(f"{device.address} is in no IOMMU group: {lack}", cure)
            continue
        if device.is_noiommu:
            yield note(
                f"{device.address} is bound without an IOMMU: who may open {device.node} can "
                "write anywhere in this VM",
                "start the VM with an IOMMU: ivsmc qemu-args (or ivsmc xml), on the host",
            )
            continue
        others = pci.neighbours(machine, device)
        users = [f"{other} ({name})" for other, name in pci.in_the_way(machine, device).items()]
        units = ", ".join(machine.names("/sys/class/iommu")) or "IOMMU"
        if users:
            yield wrong(
                f"{device.address} shares IOMMU group {device.group} with {', '.join(users)}: "
                "VFIO does not open it",
                "put the device directly on pcie.0 of the VM: ivsmc qemu-args (or ivsmc xml)",
            )
        else:
            company = f", with {', '.join(others)}" if others else ", alone"
            yield ok(f"{device.address} is in group {device.group} of {units}{company}")


def modules(scene: Scene) -> Iterator[Finding]:
    """Ask that all of VFIO is loaded."""
    bound = [device for device in scene.ivshmem if device.driver == "vfio-pci"]
    if not bound:
        return
    wanted = ["vfio", "vfio_pci"]
    if not all(device.is_noiommu for device in bound):
        wanted.append("vfio_iommu_type1")
    if missing := [name for name in wanted if not scene.machine.exists(f"/sys/module/{name}")]:
        yield wrong(f"not loaded: {', '.join(missing)}", f"modprobe -a {' '.join(missing)}")
    else:
        yield ok(f"loaded: {', '.join(wanted)}")


def access(scene: Scene) -> Iterator[Finding]:
    """Ask that this user may use the devices."""
    machine = scene.machine
    for device in scene.ivshmem:
        bound = device.driver == "vfio-pci"
        paths = [device.node] if bound and device.node else device.resources
        missing = [path for path in paths if not machine.exists(path)]
        barred = [path for path in paths if not machine.is_usable(path)]
        container = "/dev/vfio/vfio"
        if bound and scene.agent_of(device):
            yield ok(f"{' and '.join(paths)} is the agent's")
        elif missing:
            yield wrong(f"there is no {missing[0]}", "in a container: give it /dev/vfio of the VM")
        elif bound and not (machine.exists(container) and machine.is_usable(container)):
            yield wrong(f"{container} cannot be opened", f"chmod 666 {container}")
        elif not barred:
            yield ok(f"this user may use {' and '.join(paths)}")
        else:
            stays = device.has_doorbell and not pci.is_open_to_vfio(machine, device) and not bound
            yield wrong(
                f"this user may not use {' and '.join(barred)}",
                f"groupadd --system ivsmc; usermod -aG ivsmc $USER; "
                f"ivsmc bind {device.address} {'--no-vfio ' if stays else ''}--group ivsmc",
            )


def agent(scene: Scene) -> Iterator[Finding]:
    """Ask the agents that there are."""
    bound = [device for device in scene.ivshmem if device.driver == "vfio-pci"]
    for device in bound:
        if not scene.agent_of(device):
            yield note(
                f"no agent: one process at a time can use {device.address} through VFIO",
                "ivsmc agent" if len(bound) == 1 else f"ivsmc agent {device.address}",
            )
    for path in scene.agents:
        yield _answer(scene, path)


def _answer(scene: Scene, path: str) -> Finding:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(2)
        try:
            client.connect(str(scene.machine.at(path)))
        except PermissionError:
            return wrong(
                f"this user may not use {path}", "add the user to the group of that socket"
            )
        except OSError as error:
            return wrong(f"{path} does not answer: {error.strerror or error}", "ivsmc agent")
    return ok(f"the agent answers at {path}")
