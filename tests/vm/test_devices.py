"""Which device a guest uses, and what it is found to be."""

from collections.abc import Iterator

import pytest

from vm import tasks
from vm.bed import Bed
from vm.guest import DOORBELL, PLAIN, Guest
from vm.streams import accept_and_exchange, connect_and_exchange, found, memory_type
from vm.talks import Path

MIB = 1 << 20


@pytest.fixture
def unbound(bed: Bed) -> Iterator[Guest]:
    """A guest whose doorbell device has no driver; afterwards the one that other tests need."""
    guest = bed.guests[0]
    guest.call(tasks.ivsmc_here, "unbind", DOORBELL)
    yield guest
    guest.call(tasks.ivsmc_here, "bind", DOORBELL)


def test_the_fastest_is_chosen(bed: Bed) -> None:
    """Of all that both ends have, where neither names one."""
    near, far = bed.guests
    for each in bed.guests:
        assert each.call(found) == [f"vfio:{DOORBELL}", f"pci:{PLAIN}", "local"]
    with far.running(accept_and_exchange, None, MIB) as accepting:
        address = (far.address, accepting.receive())
        ends = near.call(connect_and_exchange, None, address, MIB), accepting.receive()
    assert ends == (Path("smc", f"vfio:{DOORBELL}", None),) * 2


def test_a_doorbell_device_without_vfio(bed: Bed, unbound: Guest) -> None:
    """Its memory is as good; it is woken over TCP."""
    device = f"pci:{DOORBELL}"
    assert unbound.call(memory_type, device) == "write-back"
    for far in (bed.guests[1], bed.host):
        spec = bed.spec(far, "doorbell")
        with far.running(accept_and_exchange, spec, 8 * MIB) as accepting:
            address = (far.address, accepting.receive())
            path = unbound.call(connect_and_exchange, device, address, 8 * MIB)
            assert path == Path("smc", device, None)
            assert accepting.receive() == Path("smc", spec, None)


@pytest.mark.parametrize("kind", ["doorbell", "plain"])
def test_memory_is_measured(bed: Bed, kind: str) -> None:
    """QEMU's is the host's, and cached."""
    guest = bed.guests[0]
    assert guest.call(memory_type, bed.spec(guest, kind)) == "write-back"
