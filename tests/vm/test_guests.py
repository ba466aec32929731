"""The test bed itself, and what works between guests without their device: TCP."""

import pytest

from vm import tasks
from vm.bed import Bed
from vm.guest import DOORBELL, PLAIN, VECTORS
from vm.ivshmem import client
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
    with client(bed.server, PATIENCE) as observer:
        assert len(observer.peers) == len(bed.guests) + 1
        assert set(observer.peers.values()) == {VECTORS}


@pytest.mark.parametrize("turn", [0, 1], ids=["there", "back"])
@pytest.mark.parametrize(
    ("client", "server"), [("plain", "ivsmc"), ("ivsmc", "plain"), ("ivsmc", "ivsmc")]
)
def test_plain_tcp_between_guests(bed: Bed, client: str, server: str, turn: int) -> None:
    """Also of an unmodified program in one with ivsmc in the other; ``local`` is each one's own."""
    near, far = bed.guests[turn], bed.guests[1 - turn]
    with far.running(answer_pings, server, "local", PINGS) as answering:
        address = (far.address, answering.receive())
        ends = near.call(ping, client, "local", address, PINGS), answering.receive()
    expected = {
        "plain": Path("socket", None, None),
        "ivsmc": Path("tcp", None, "PLAIN_CLIENT"),
    }
    print(ends)
    assert ends[1] == expected[server]
    assert ends[0] == (Path("tcp", None, "PEER_NO_SMC") if client == "ivsmc" else expected["plain"])
