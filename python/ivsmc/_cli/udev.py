"""udev rules that do at every boot what ``ivsmc bind`` does now."""

from ivsmc._cli.pci import PciDevice

__all__ = ["Grant", "path", "sysfs_rule", "vfio_rule"]

_DIRECTORY = "/etc/udev/rules.d"


class Grant:
    """Who may use a device."""

    def __init__(self, group: str | None, mode: int | None) -> None:
        self.group = group
        self.mode = mode


def path(device: PciDevice) -> str:
    """Return where the rule of ``device`` is."""
    return f"{_DIRECTORY}/70-ivsmc-{device.address.replace(':', '-')}.rules"


def vfio_rule(device: PciDevice, grant: Grant, before: list[str]) -> str:
    """Return what binds the device when it comes, after the shell commands ``before``."""
    commands = [*before, f"echo {device.address} > /sys/bus/pci/drivers_probe"]
    lines = [
        f'{_match(device)}, ATTR{{driver_override}}="vfio-pci", '
        f'RUN{{builtin}}+="kmod load vfio-pci", {_run(commands)}'
    ]
    words = [f'GROUP="{grant.group}"'] if grant.group is not None else []
    words += [f'MODE="{grant.mode:04o}"'] if grant.mode is not None else []
    if words:
        # The group may have another number at the next boot: it is known by who is in it.
        member = f"/sys/kernel/iommu_groups/$${{g#noiommu-}}/devices/{device.address}"
        test = f"PROGRAM==\"/bin/sh -c 'g=%k; test -e {member}'\""
        lines.append(", ".join(['SUBSYSTEM=="vfio"', test, *words]))
    return _text(device, lines)


def sysfs_rule(device: PciDevice, grant: Grant) -> str:
    """Return what switches the device's memory on when it comes, and says who may use it."""
    files = " ".join(device.resources)
    commands = [f"echo 1 > {device.path}/enable"]
    if grant.group is not None:
        commands.append(f"chgrp {grant.group} {files}")
    if grant.mode is not None:
        commands.append(f"chmod {grant.mode:o} {files}")
    return _text(device, [f"{_match(device)}, {_run(commands)}"])


def _match(device: PciDevice) -> str:
    return (
        f'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="{device.address}", '
        'ATTR{vendor}=="0x1af4", ATTR{device}=="0x1110"'
    )


def _run(commands: list[str]) -> str:
    return f"RUN+=\"/bin/sh -c '{'; '.join(commands)}'\""


def _text(device: PciDevice, lines: list[str]) -> str:
    head = f"# Written by ivsmc bind --persist; ivsmc unbind {device.address} removes it."
    return "\n".join([head, *lines, ""])
