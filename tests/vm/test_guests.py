"""The test bed itself, and what goes between guests in plain TCP."""

import pytest

from ivsmc._cli.ivshmem import look
from vm import tasks
from vm.bed import Bed
from vm.guest import DOORBELL, PLAIN, VECTORS
from vm.machine import PATIENCE
from vm.talks import Path, answer_pings, ping

PINGS = 50


def test_each_guest_has_both_devices(bed: Bed) -> None:
    for each in bed.guests:
        listed = each.call(tasks.run, "lspci", "-Dn", "-d", "1af4:1110")
        found = [line.split()[:3] for line in listed.splitlines()]
        assert found == [[place, "0500:", "1af4:1110"] for place in (DOORBELL, PLAIN)]


def test_our_ivshmem_server_serves_them(bed: Bed) -> None:
    """Each has an id, and all of its vectors."""
    found = look(str(bed.server), PATIENCE)
    assert (found.peers, found.vectors) == (len(bed.guests), VECTORS)


@pytest.mark.parametrize("kind", ["doorbell", "plain"])
@pytest.mark.parametrize("turn", [0, 1], ids=["there", "back"])
@pytest.mark.parametrize(("client", "server"), [("plain", "ivsmc"), ("ivsmc", "plain")])
def test_an_unmodified_program(bed: Bed, client: str, server: str, turn: int, kind: str) -> None:
    """It is talked to in plain TCP, though both guests have the device that ivsmc uses."""
    near, far = bed.guests[turn], bed.guests[1 - turn]
    with far.running(answer_pings, server, bed.spec(far, kind), PINGS) as answering:
        address = (far.address, answering.receive())
        ends = near.call(ping, client, bed.spec(near, kind), address, PINGS), answering.receive()
    socket = Path("socket", None, None)
    if client == "ivsmc":
        assert ends == (Path("tcp", None, "PEER_NO_SMC"), socket)
    else:
        assert ends == (socket, Path("tcp", None, "PLAIN_CLIENT"))


def test_without_a_region_in_common(bed: Bed) -> None:
    """``local`` is each guest's own."""
    near, far = bed.guests
    with far.running(answer_pings, "ivsmc", "local", PINGS) as answering:
        address = (far.address, answering.receive())
        assert near.call(ping, "ivsmc", "local", address, PINGS) == Path("tcp", None, "PEER_NO_SMC")
        assert answering.receive() == Path("tcp", None, "PLAIN_CLIENT")
