"""What a check of ``ivsmc doctor`` sees and says."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ivsmc._cli import pci, sockets
from ivsmc._cli.machine import Machine
from ivsmc._cli.pci import PciDevice

__all__ = ["Finding", "Scene", "Verdict", "note", "ok", "wrong"]


class Verdict(enum.StrEnum):
    """How something is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing that was asked for is wrong."""
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    text: str
    cure: str | None = None
    """The command that mends it, or what to do."""


def ok(text: str) -> Finding:
    """Say that all is well."""
    return Finding(Verdict.OK, text)


def note(text: str, cure: str | None = None) -> Finding:
    """Say what is worth knowing."""
    return Finding(Verdict.NOTE, text, cure)


def wrong(text: str, cure: str | None) -> Finding:
    """Say what does not work."""
    return Finding(Verdict.WRONG, text, cure)


@dataclass(frozen=True)
class Scene:
    """What checks look at."""

    machine: Machine
    environment: Mapping[str, str]
    devices: list[dict[str, Any]] = field(default_factory=list)
    """What ``ivsmc.devices()`` says."""
    sockets: tuple[str, ...] = ()
    """ivshmem servers that were asked about."""
    host: bool = False
    """It was asked whether this machine can run VMs with a region."""
    guest: bool = False
    """It was asked whether this is a VM with a region and doorbells."""

    @property
    def ivshmem(self) -> list[PciDevice]:
        """The ivshmem devices of this VM."""
        return pci.find(self.machine)

    @property
    def agents(self) -> list[str]:
        """The sockets of agents."""
        names = self.machine.names(sockets.DIRECTORY)
        return sorted(f"{sockets.DIRECTORY}/{name}" for name in names if sockets.is_agent(name))

    def agent_of(self, device: PciDevice) -> str | None:
        """Return the socket of the agent that owns ``device``."""
        paths = (sockets.agent_of(device.address), sockets.AGENT)
        return next((path for path in paths if path in self.agents), None)

    def if_host(self, text: str, cure: str | None) -> Finding:
        """Return what is wrong for who wants to run VMs, and worth knowing for others."""
        return wrong(text, cure) if self.host else note(text, cure)

    def if_guest(self, text: str, cure: str | None) -> Finding:
        """Return what is wrong for who wants a VM with doorbells, and worth knowing for others."""
        return wrong(text, cure) if self.guest else note(text, cure)
