"""What a VM is to be given, for the commands that print it: a region, and a machine to suit."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from ivsmc._cli import sockets
from ivsmc._cli.arguments import bounded, size
from ivsmc._cli.ivshmem import admission, look
from ivsmc._cli.machine import Refused

__all__ = ["Doorbell", "Plain", "Region", "Request", "add_options", "request"]

_SMALLEST = 1 << 20
"""Bytes of the smallest region."""


@dataclass(frozen=True)
class Doorbell:
    """The region of an ivshmem server, with interrupts."""

    socket: str
    vectors: int


@dataclass(frozen=True)
class Plain:
    """A shared file, without interrupts."""

    file: str
    size: int


Region: TypeAlias = Doorbell | Plain


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    region: Region
    name: str
    """Starts the names of what is made for it."""
    iommu: bool
    """The machine gets an IOMMU, which VFIO needs in the guest."""
    caching_mode: bool
    notes: list[str] = field(default_factory=list)
    """What else is to be done, for people."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the region and the machine."""
    region = parser.add_mutually_exclusive_group()
    region.add_argument(
        "--socket",
        default=sockets.SERVER,
        metavar="PATH",
        help="ivshmem-doorbell: the socket of an ivshmem server (default: %(default)s)",
    )
    region.add_argument(
        "--file",
        metavar="PATH",
        help="ivshmem-plain: a shared file; no interrupts, host processes use it as file:PATH",
    )
    parser.add_argument(
        "--vectors",
        type=bounded(1, 256),
        metavar="N",
        help="interrupts (default: as many as the ivshmem server has, which must run then)",
    )
    parser.add_argument(
        "--size", type=size, help="bytes of the file, K, M or G (default: those it has)"
    )
    parser.add_argument(
        "--name",
        type=_name,
        default="ivsmc0",
        help="name of the device, another one for each of a VM's (default: %(default)s)",
    )
    parser.add_argument(
        "--no-iommu",
        action="store_true",
        help="leave out the machine type and the IOMMU: the VM has them, or does not use vfio",
    )
    parser.add_argument(
        "--caching-mode",
        action="store_true",
        help="also for VMs with passed-through devices of the host, which need that",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def request(options: argparse.Namespace) -> Request:
    """Return what ``options`` ask for. Raises ``Refused`` for what cannot be."""
    notes: list[str] = []
    region: Region
    if options.file is not None:
        if options.vectors is not None:
            options.parser.error("--vectors: an ivshmem-plain device has none; give --socket")
        region = _plain(options, notes)
    else:
        if options.size is not None:
            options.parser.error("--size: the ivshmem server decides it; give --file")
        region = _doorbell(options, notes)
    iommu = isinstance(region, Doorbell) and not options.no_iommu
    if iommu:
        notes.append("boot the guest with intel_iommu=on, then run there: ivsmc bind")
    return Request(region, options.name, iommu, options.caching_mode, notes)


def _doorbell(options: argparse.Namespace, notes: list[str]) -> Doorbell:
    path = str(Path(options.socket).absolute())
    try:
        there = look(path).vectors
    except PermissionError:
        if options.vectors is None:
            raise Refused(
                f"this user may not join the ivshmem server at {path}: {admission(path)}; or say "
                "how many --vectors it has"
            ) from None
        notes.append(f"the VM's user must be let join, which this one is not: {admission(path)}")
        return Doorbell(path, options.vectors)
    except OSError as error:
        if options.vectors is None:
            raise Refused(
                f"no ivshmem server answers at {path} ({error.strerror or error}); start it: "
                f"ivsmc server {path}, or say how many --vectors it will have"
            ) from None
        notes.append(f"start the ivshmem server before the VM: ivsmc server {path}")
        return Doorbell(path, options.vectors)
    wanted = there if options.vectors is None else options.vectors
    if wanted < there:
        raise Refused(
            f"the ivshmem server at {path} hands out {there} vectors, and QEMU refuses more than "
            f"the device has: give --vectors {there}"
        )
    return Doorbell(path, wanted)


def _plain(options: argparse.Namespace, notes: list[str]) -> Plain:
    file = Path(options.file).absolute()
    has = file.stat().st_size if file.is_file() else None
    wanted = options.size or has
    if not wanted:
        raise Refused(f"{file}: there is no such file; say its --size")
    if wanted & (wanted - 1) or wanted < _SMALLEST:
        raise Refused(f"{file}: {wanted} bytes: a region has a power of two, at least 1M")
    if has and wanted != has:
        raise Refused(f"{file} has {has} bytes, not {wanted}: all who share it need one size")
    if not has:
        # QEMU makes it too, but with holes: memory that runs out later ends the VM. Its own
        # remedy, prealloc=on, writes back what it has read on old kernels, into a living region.
        notes.append(f"make the file first: fallocate -l {wanted} {file}")
    notes.append("run in the guest: ivsmc bind")
    return Plain(str(file), wanted)


def _name(text: str) -> str:
    if not (text[:1].isalpha() and all(c.isalnum() or c in "-_." for c in text)):
        raise argparse.ArgumentTypeError(f"not a name: {text!r} (a letter, then letters, digits)")
    return text
