"""The checks of ``ivsmc doctor``: a table of small functions of a scene."""

from collections.abc import Callable, Iterator

from ivsmc._cli.checks import guest, here, host
from ivsmc._cli.checks.finding import Finding, Scene, Verdict

__all__ = ["CHECKS", "Finding", "Scene", "Verdict"]

CHECKS: dict[str, Callable[[Scene], Iterator[Finding]]] = {
    "system": here.system,
    "variables": here.variables,
    "shm": here.shared_memory,
    "qemu": host.qemu,
    "kvm": host.kvm,
    "servers": host.servers,
    "pci": guest.present,
    "driver": guest.driver,
    "iommu": guest.iommu,
    "modules": guest.modules,
    "access": guest.access,
    "agent": guest.agent,
    "devices": here.devices,
    "regions": here.regions,
}
"""In the order in which they are shown, with the names under which they are."""
