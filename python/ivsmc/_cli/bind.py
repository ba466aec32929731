"""``ivsmc bind`` and ``ivsmc unbind``: give an ivshmem device to user space, and take it back."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator

from ivsmc._cli import binding, pci
from ivsmc._cli.arguments import Commands, permissions
from ivsmc._cli.binding import Wish
from ivsmc._cli.machine import Machine, Refused
from ivsmc._cli.pci import PciDevice
from ivsmc._cli.steps import Step, carry_out


def add_parser(commands: Commands) -> None:
    """Add both commands."""
    parser = commands.add_parser(
        "bind",
        help="give an ivshmem device of this VM to user space",
        description="Make an ivshmem device of this VM usable as vfio:BDF: load vfio-pci, bind "
        "the device to it, set who may open it. An ivshmem-plain device has no interrupts and "
        "needs no driver: its memory is switched on for pci:BDF, and --group and --mode are for "
        "that; so it is with --no-vfio. What is so already is left alone; when a step fails, those "
        "before it are undone. Needs root.",
    )
    parser.add_argument(
        "--group",
        metavar="GROUP",
        help="group that may use the device, by name or number (mode 660 unless --mode)",
    )
    parser.add_argument(
        "--mode", type=permissions, metavar="OCTAL", help="permissions, such as 660"
    )
    parser.add_argument(
        "--persist",
        action="store_true",
        help="do it at every boot: a udev rule in /etc/udev/rules.d",
    )
    without = parser.add_mutually_exclusive_group()
    without.add_argument(
        "--no-vfio",
        action="store_true",
        help="leave it unbound, for pci:BDF: where the VM has no IOMMU. Several processes can use "
        "it then, which notify by doorbells and are themselves woken over TCP",
    )
    without.add_argument(
        "--unsafe-noiommu",
        action="store_true",
        help="bind without an IOMMU. Unsafe: the device's interrupts are writes to memory that "
        "nothing confines then, so who may open the device can write anywhere in this VM",
    )
    _add_common(parser)
    parser.set_defaults(run=run_bind)
    parser = commands.add_parser(
        "unbind",
        help="take an ivshmem device back from user space",
        description="Unbind an ivshmem device from vfio-pci, let other drivers have it, leave its "
        "files to root, and remove the udev rule of ivsmc bind --persist; after the last device "
        "without an IOMMU, VFIO takes no more of them. Refused while a process has it open through "
        "VFIO. Needs root.",
    )
    _add_common(parser)
    parser.set_defaults(run=run_unbind)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "device", nargs="?", metavar="BDF", help="its PCI address (default: the only one there is)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only show what would be done")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run_bind(options: argparse.Namespace) -> int:
    """Bind, and say what was done."""
    machine = Machine()
    device = pci.named(machine, options.device)
    wish = Wish(
        group=options.group,
        mode=options.mode,
        persist=options.persist,
        no_vfio=options.no_vfio,
        unsafe_noiommu=options.unsafe_noiommu,
        dry_run=options.dry_run,
    )
    return _carry_out(machine, device, binding.bound(machine, device, wish), options)


def run_unbind(options: argparse.Namespace) -> int:
    """Unbind, and say what was done."""
    machine = Machine()
    device = pci.named(machine, options.device)
    return _carry_out(machine, device, binding.unbound(machine, device), options)


def _carry_out(
    machine: Machine, device: PciDevice, steps: Iterator[Step], options: argparse.Namespace
) -> int:
    if not (options.dry_run or machine.is_root()):
        raise Refused("this needs root (sudo); --dry-run shows what would be done")
    done = carry_out(steps, _say(options), dry_run=options.dry_run)
    device = pci.describe(machine, device.address)
    spec = binding.spec(device)
    if options.json:
        report = {
            "device": device.address,
            "model": device.model,
            "driver": device.driver,
            "node": device.node,
            "spec": spec,
            "dry_run": options.dry_run,
            "steps": done,
        }
        print(json.dumps(report, indent=2))
    elif not options.dry_run:
        changed = "" if done else "nothing to do: "
        print(f"{changed}{device.address} has {_driver(device)}; it is the device {spec}")
    return 0


def _driver(device: PciDevice) -> str:
    return f"the driver {device.driver}" if device.driver else "no driver"


def _say(options: argparse.Namespace) -> Callable[[str], None]:
    """Return what tells people; with ``--json`` it goes where it is not in the way."""
    stream = sys.stderr if options.json else sys.stdout
    return lambda text: print(text, file=stream, flush=True)
