"""A guest is paused, reset or killed in mid-stream.

Its peers are in the other guest and in the host, on both kinds of device, all at once. The last
tests of the bed: they leave it with guests that have begun anew.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

import pytest

from vm import tasks
from vm.bed import Bed
from vm.guest import Guest
from vm.machine import Job
from vm.streams import Flow, census, connect_flow, serve_flows, slots_at

KINDS = ("doorbell", "plain")
PEERS = ("one", "host")
TRIES = 300
"""Looks at a region, of a tenth of a second each, until it must be clean."""
RESET = {"ConnectionResetError", "BrokenPipeError", "done"}
"""How the two threads of an end can see a reset: one of them is told, once, as with TCP."""


@pytest.fixture
def victim(bed: Bed) -> Guest:
    """The guest that it happens to; up again, if a test has failed and left it dead."""
    guest = bed.guests[1]
    if not guest.is_up:
        bed.boot(guest)
        guest.set_up()
    return guest


class Streams:
    """Sessions between the victim and all of its peers, in full flow."""

    def __init__(self, serving: dict[str, Job], peers: dict[tuple[str, str], Job]) -> None:
        self.serving = serving
        self.peers = peers

    def finish(self) -> None:
        """Have all end properly; each has received what its peer has sent."""
        for job in (*self.peers.values(), *self.serving.values()):
            job.send("end")
        for kind, server in self.serving.items():
            near = [job.receive() for (its, _), job in self.peers.items() if its == kind]
            far = server.receive()
            assert {flow.ends for flow in (*near, *far)} == {("done", "done")}
            passed = sorted((flow.sent, flow.received) for flow in near)
            assert passed == sorted((flow.received, flow.sent) for flow in far)

    def end_with_a_reset(self, kind: str) -> list[Flow]:
        """Have the victim's peers on devices of this kind see a reset."""
        flows = [job.receive() for (its, _), job in self.peers.items() if its == kind]
        for flow in flows:
            assert "ConnectionResetError" in flow.ends
            assert set(flow.ends) <= RESET
        return flows


@contextlib.contextmanager
def streams(bed: Bed, victim: Guest) -> Iterator[Streams]:
    """Two sessions on each kind of device, in full flow."""
    with contextlib.ExitStack() as cleanup:
        serving, peers = {}, {}
        for kind in KINDS:
            running = victim.running(serve_flows, bed.spec(victim, kind), len(PEERS))
            serving[kind] = cleanup.enter_context(running)
            address = (victim.address, serving[kind].receive())
            for name in PEERS:
                peer = bed.machine(name)
                running = peer.running(connect_flow, bed.spec(peer, kind), address)
                peers[kind, name] = cleanup.enter_context(running)
        for job in peers.values():
            assert job.receive() == "flows"
        yield Streams(serving, peers)


def assert_clean(bed: Bed, kind: str) -> None:
    """Wait until all of the region's memory is back.

    Processes of guests that have ended may still have their slot: it takes a successor on the same
    device to say so.
    """
    for _ in range(TRIES):
        found = bed.host.call(census, bed.spec(bed.host, kind))
        if found["extents"] <= found["live"] and not any(
            found[what] for what in ("dead", "listeners", "intents", "dmbs_held", "dmbs_attached")
        ):
            return
        time.sleep(0.1)
    raise AssertionError(found)


def assert_new_sessions_work(bed: Bed, victim: Guest, before: list[Flow]) -> None:
    """The guest has slots of another generation than the sessions ``before`` had."""
    with streams(bed, victim) as again:
        for job in (*again.peers.values(), *again.serving.values()):
            job.send("end")
        for (kind, _), job in again.peers.items():
            flow = job.receive()
            assert flow.ends == ("done", "done")
            same = [old for old in before if old.path.device == flow.path.device]
            assert flow.peer not in {old.peer for old in same}, kind


@pytest.mark.parametrize("seconds", [10, 60])
def test_paused(bed: Bed, victim: Guest, seconds: int) -> None:
    """Nothing but delay, also when keepalive has asked in vain: after 30 s, and every 15 s."""
    with streams(bed, victim) as flowing:
        victim.pause()
        time.sleep(seconds)
        victim.resume()
        flowing.finish()


def test_reset(bed: Bed, victim: Guest) -> None:
    """Its peers see it at the latest when it is back."""
    with streams(bed, victim) as flowing:
        victim.reset()
        victim.set_up()
        for kind in KINDS:
            victim.call(census, bed.spec(victim, kind))  # it attaches
        ended = [flow for kind in KINDS for flow in flowing.end_with_a_reset(kind)]
    for kind in KINDS:
        assert_clean(bed, kind)
    assert_new_sessions_work(bed, victim, ended)


def test_killed(bed: Bed, victim: Guest) -> None:
    """The ivshmem server tells its clients at once; on plain devices, when the guest is back."""
    with streams(bed, victim) as flowing:
        victim.kill()
        ended = flowing.end_with_a_reset("doorbell")
        assert_clean(bed, "doorbell")
        bed.boot(victim)
        victim.set_up()
        for kind in KINDS:
            victim.call(census, bed.spec(victim, kind))
        ended += flowing.end_with_a_reset("plain")
    for kind in KINDS:
        assert_clean(bed, kind)
    assert_new_sessions_work(bed, victim, ended)


def test_killed_and_given_up(bed: Bed, victim: Guest) -> None:
    """Nobody but an operator can say on a plain device that a guest is gone for good."""
    plain = bed.spec(bed.host, "plain")
    before, others = bed.host.call(census, plain), bed.host.call(slots_at, plain, victim.address)
    with streams(bed, victim) as flowing:
        [slot] = bed.host.call(slots_at, plain, victim.address) - others
        victim.kill()
        for name in PEERS:
            flowing.peers["plain", name].kill()
            peer = bed.machine(name)
            peer.call(census, bed.spec(peer, "plain"))  # what they had is taken back
        assert slot in bed.host.call(slots_at, plain, victim.address)
        assert bed.host.call(census, plain)["dmbs_held"] > 0
        declare = ["region", plain, "--declare-dead", slot, "--yes"]
        bed.host.call(tasks.run, sys.executable, "-m", "ivsmc", *declare)
        assert bed.host.call(slots_at, plain, victim.address) == others
        assert bed.host.call(census, plain) == before
