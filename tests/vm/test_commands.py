"""``ivsmc bind``, ``unbind`` and ``doctor`` against a guest's own kernel."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from vm import tasks
from vm.bed import Bed
from vm.commands import Given, come_anew, hold_open, status_of
from vm.guest import DOORBELL, PLAIN, Guest

IVSMC = [sys.executable, "-m", "ivsmc"]
RULES = "/etc/udev/rules.d"
GROUP = "daemon"
"""One that any Linux has, and root is not in."""


@pytest.fixture
def machine(bed: Bed) -> Iterator[Guest]:
    """A guest whose doorbell device has no driver; afterwards the one that other tests need."""
    guest = bed.guests[0]
    guest.call(tasks.ivsmc_here, "unbind", DOORBELL)
    yield guest
    guest.call(tasks.ivsmc_here, "bind", DOORBELL)


@pytest.fixture
def keeper(bed: Bed) -> Iterator[Guest]:
    """A guest that can be given rules for udev; without them afterwards."""
    guest = bed.guests[0]
    guest.call(tasks.run, "mount", "-t", "tmpfs", "ivsmc", RULES)
    yield guest
    for device in (DOORBELL, PLAIN):
        guest.call(tasks.ivsmc_here, "unbind", device)
    guest.call(tasks.run, "umount", RULES)
    guest.call(tasks.run, "udevadm", "control", "--reload")
    for device in (DOORBELL, PLAIN):
        guest.call(tasks.ivsmc_here, "bind", device)


def report(machine: Guest, *arguments: str) -> dict[str, Any]:
    status, out, err = machine.call(status_of, [*IVSMC, *arguments, "--json"])
    assert status == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_bind_and_unbind(machine: Guest) -> None:
    dry = report(machine, "bind", DOORBELL, "--mode", "666", "--persist", "--dry-run")
    assert dry["driver"] is None, "nothing was done"
    first = report(machine, "bind", DOORBELL, "--mode", "666")
    assert (first["driver"], first["spec"]) == ("vfio-pci", f"vfio:{DOORBELL}")
    assert machine.call(tasks.run, "stat", "-c", "%a", first["node"]) == "666\n"
    assert report(machine, "bind", DOORBELL, "--mode", "666")["steps"] == []
    with machine.running(hold_open, first["node"]) as holder:
        assert holder.receive() == "open"
        status, _, err = machine.call(status_of, [*IVSMC, "unbind", DOORBELL])
        assert (status, f"fuser -v {first['node']}" in err) == (1, True), err
        holder.send(None)
    taken = report(machine, "unbind", DOORBELL)
    assert (taken["driver"], taken["spec"]) == (None, f"pci:{DOORBELL}")
    assert report(machine, "unbind", DOORBELL)["steps"] == []


def test_bind_a_plain_device(machine: Guest) -> None:
    bound = report(machine, "bind", PLAIN, "--mode", "600")
    assert (bound["driver"], bound["spec"]) == (None, f"pci:{PLAIN}")


@pytest.mark.parametrize(("device", "driver"), [(DOORBELL, "vfio-pci"), (PLAIN, None)])
def test_bind_at_every_boot(keeper: Guest, device: str, driver: str | None) -> None:
    """The guest's own udev does as the rule says, when the device comes."""
    options = ["--group", GROUP, "--mode", "640", "--persist"]
    bound = report(keeper, "bind", device, *options)
    file = bound["node"] if driver else f"/sys/bus/pci/devices/{device}/resource2"
    assert keeper.call(come_anew, device, file) == Given(driver, GROUP, 0o640)


def test_one_of_two_must_be_named(machine: Guest) -> None:
    status, _, err = machine.call(status_of, [*IVSMC, "bind"])
    assert (status, f"name one: {DOORBELL}, {PLAIN}" in err) == (1, True), err


def test_the_doctor_in_a_guest(machine: Guest) -> None:
    status, out, _ = machine.call(status_of, [*IVSMC, "doctor", "--guest", "--json"])
    unbound = {(entry["check"], entry["verdict"]): entry for entry in json.loads(out)["findings"]}
    assert status == 1
    assert unbound["driver", "wrong"]["cure"] == f"ivsmc bind {DOORBELL}"
    report(machine, "bind", DOORBELL)
    status, out, _ = machine.call(status_of, [*IVSMC, "doctor", "--guest", "--json"])
    bound = json.loads(out)
    assert (status, bound["ok"]) == (0, True), bound
    texts = "\n".join(f"{entry['check']}: {entry['text']}" for entry in bound["findings"])
    assert f"pci: {DOORBELL} is ivshmem-doorbell, revision 1, region of 64 MiB" in texts
    assert f"pci: {PLAIN} is ivshmem-plain, revision 1, region of 64 MiB" in texts
    assert f"driver: {DOORBELL} is bound to vfio-pci" in texts
    assert f"iommu: {DOORBELL} is in group" in texts
    for spec in (f"vfio:{DOORBELL}", f"pci:{PLAIN}", "local"):
        assert f"round trip: {spec}: 1 MiB came as sent" in texts
