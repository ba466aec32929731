"""``ivsmc qemu-args``: the options that give a QEMU VM a region."""

import argparse
import json
import shlex
import sys
import uuid

from ivsmc._cli.arguments import Commands
from ivsmc._cli.vm import Doorbell, Request, add_options, request


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "qemu-args",
        help="print the QEMU options for a region",
        description="Print the options that give a QEMU VM the region of an ivshmem server "
        "(ivshmem-doorbell; with the IOMMU that VFIO needs in the guest) or of a shared file "
        "(ivshmem-plain), in one line for the shell. Standard error says what else is to be done.",
    )
    add_options(parser)
    parser.add_argument(
        "--accel",
        choices=["kvm", "tcg"],
        default="kvm",
        help="what the VM runs on: under KVM the IOMMU needs kernel-irqchip=split "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--uuid",
        type=_uuid,
        help="the VM's own, always the same: what it held when it was killed or reset is given "
        "back when it returns",
    )
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Print the options."""
    wanted = request(options)
    words = arguments(wanted, options.accel, options.uuid)
    notes = list(wanted.notes)
    if options.uuid is None:
        notes.append(
            "give the VM a -uuid of its own (uuidgen makes one), always the same: what it held "
            "when it was killed or reset is given back when it returns"
        )
    if options.json:
        print(json.dumps({"arguments": words, "notes": notes}, indent=2))
        return 0
    print(shlex.join(words))
    for note in notes:
        print(f"ivsmc qemu-args: {note}", file=sys.stderr)
    return 0


def arguments(wanted: Request, accel: str, vm: str | None) -> list[str]:
    """Return QEMU's options."""
    words = []
    if wanted.iommu:
        # Without interrupt remapping VFIO calls the IOMMU unsafe; under KVM remapping wants the
        # interrupt controller in QEMU. The IOMMU must come before the devices it is for.
        machine = "q35,accel=kvm,kernel-irqchip=split" if accel == "kvm" else "q35,accel=tcg"
        caching = ",caching-mode=on" if wanted.caching_mode else ""
        words += ["-machine", machine, "-device", f"intel-iommu,intremap=on{caching}"]
    if vm is not None:
        words += ["-uuid", vm]
    return words + device(wanted)


def device(wanted: Request) -> list[str]:
    """Return the options of the ivshmem device alone."""
    name, region = wanted.name, wanted.region
    if isinstance(region, Doorbell):
        return [
            "-chardev",
            f"socket,id={name}-server,path={_escaped(region.socket)}",
            "-device",
            f"ivshmem-doorbell,id={name},chardev={name}-server,vectors={region.vectors}",
        ]
    return [
        "-object",
        f"memory-backend-file,id={name}-memory,mem-path={_escaped(region.file)},"
        f"size={region.size},share=on",
        "-device",
        f"ivshmem-plain,id={name},memdev={name}-memory",
    ]


def _escaped(path: str) -> str:
    """Return ``path`` as QEMU's options want it: a comma would end it."""
    return path.replace(",", ",,")


def _uuid(text: str) -> str:
    try:
        value = uuid.UUID(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a uuid: {text!r}") from None
    if not value.int or value.int == (1 << 128) - 1:
        raise argparse.ArgumentTypeError("that uuid names no VM; uuidgen makes one")
    return str(value)
