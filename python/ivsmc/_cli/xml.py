"""``ivsmc xml``: the elements that give a libvirt domain a region."""

import argparse
import json
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

from ivsmc._cli import qemu_args
from ivsmc._cli.arguments import Commands, bounded
from ivsmc._cli.vm import Doorbell, Request, add_options, request

QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"
_SHM = Path("/dev/shm")
"""Where libvirt has the files of its shmem elements."""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "xml",
        help="print the libvirt elements for a region",
        description="Print what a libvirt domain needs to have the region of an ivshmem server "
        "(ivshmem-doorbell; with the IOMMU that VFIO needs in the guest) or of a shared file "
        "(ivshmem-plain), as a domain with nothing else in it: merge it into yours (virsh edit). "
        "A file that is not in /dev/shm goes through qemu:commandline. Standard error says what "
        "else is to be done.",
    )
    add_options(parser)
    parser.add_argument(
        "--slot",
        type=bounded(1, 31),
        default=16,
        metavar="N",
        help="slot on pcie.0, a free one for each of a VM's devices (default: %(default)s)",
    )
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Print the elements."""
    wanted = request(options)
    text = domain(wanted, options.slot)
    notes = list(wanted.notes)
    if isinstance(wanted.region, Doorbell):
        notes.append(
            "libvirt's QEMU must be able to open the socket: run ivsmc server as its user "
            "(libvirt-qemu or qemu), or with --group of its group"
        )
    if options.json:
        print(json.dumps({"xml": text, "notes": notes}, indent=2))
        return 0
    print(text)
    for note in notes:
        print(f"ivsmc xml: {note}", file=sys.stderr)
    return 0


def domain(wanted: Request, slot: int) -> str:
    """Return a domain with the elements and no others."""
    ET.register_namespace("qemu", QEMU)
    root = ET.Element("domain", type="kvm")
    if wanted.iommu:
        system = ET.SubElement(root, "os")
        ET.SubElement(system, "type", arch="x86_64", machine="q35").text = "hvm"
        # Interrupt remapping under KVM wants the interrupt controller in QEMU.
        ET.SubElement(ET.SubElement(root, "features"), "ioapic", driver="qemu")
    devices = ET.Element("devices")
    if (element := _shmem(wanted, slot)) is not None:
        devices.append(element)
    if wanted.iommu:
        caching = {"caching_mode": "on"} if wanted.caching_mode else {}
        iommu = ET.SubElement(devices, "iommu", model="intel")
        ET.SubElement(iommu, "driver", {"intremap": "on", **caching})
    if len(devices):
        root.append(devices)
    if element is None:
        line = ET.SubElement(root, f"{{{QEMU}}}commandline")
        *words, device = qemu_args.device(wanted)
        for word in (*words, f"{device},bus=pcie.0,addr={slot:#x}"):
            ET.SubElement(line, f"{{{QEMU}}}arg", value=word)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode")


def _shmem(wanted: Request, slot: int) -> ET.Element | None:
    """Return the element of the device; None for a file that libvirt has no element for."""
    region = wanted.region
    if isinstance(region, Doorbell):
        element = ET.Element("shmem", name=wanted.name)
        ET.SubElement(element, "model", type="ivshmem-doorbell")
        ET.SubElement(element, "server", path=region.socket)
        ET.SubElement(element, "msi", vectors=str(region.vectors), ioeventfd="on")
    elif Path(region.file).parent == _SHM:
        element = ET.Element("shmem", name=Path(region.file).name)
        ET.SubElement(element, "model", type="ivshmem-plain")
        ET.SubElement(element, "size", unit="M").text = str(region.size >> 20)
    else:
        return None
    # By itself libvirt puts it behind a bridge, in one IOMMU group with what else is there.
    ET.SubElement(
        element,
        "address",
        {
            "type": "pci",
            "domain": "0x0000",
            "bus": "0x00",
            "slot": f"{slot:#04x}",
            "function": "0x0",
        },
    )
    return element
