"""A guest is paused, reset or killed in mid-stream.

Its peers are in the other guest and in the host, on both kinds of device, all at once. The last
tests of the bed: they leave it with guests that have begun anew.

``--vm-ends 100`` has the guest reset and killed a hundred times, for an hour or two.
"""

import contextlib
import random
import sys
import time
from collections.abc import Iterator

import pytest

from vm import tasks
from vm.bed import Bed
from vm.guest import Guest
from vm.machine import Job, Machine
from vm.streams import Flow, census, connect_flow, serve_flows, slots_at

KINDS = ("doorbell", "plain")
PEERS = ("one", "host")
TRIES = 300
"""Looks at a region, of a tenth of a second each, until it must be clean."""
MOMENTS = 0.5
"""Seconds at most from when all streams flow until the guest is reset or killed."""
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
    """Sessions between a guest and all of its peers, in full flow."""

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
        """Have the guest's peers on devices of this kind see a reset."""
        flows = [job.receive() for (its, _), job in self.peers.items() if its == kind]
        for flow in flows:
            assert "ConnectionResetError" in flow.ends
            assert set(flow.ends) <= RESET
        return flows


@contextlib.contextmanager
def streams(bed: Bed, server: Machine, *names: str) -> Iterator[Streams]:
    """A session of each of these peers on each kind of device, in full flow."""
    with contextlib.ExitStack() as cleanup:
        serving, peers = {}, {}
        for kind in KINDS:
            running = server.running(serve_flows, bed.spec(server, kind), len(names))
            serving[kind] = cleanup.enter_context(running)
            address = (server.address, serving[kind].receive())
            for name in names:
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


@pytest.mark.parametrize("seconds", [10, 60])
def test_paused(bed: Bed, victim: Guest, seconds: int) -> None:
    """Nothing but delay, also when keepalive has asked in vain: after 30 s, and every 15 s."""
    with streams(bed, victim, *PEERS) as flowing:
        victim.pause()
        time.sleep(seconds)
        victim.resume()
        flowing.finish()


def reset(bed: Bed, victim: Guest, flowing: Streams, others: Streams) -> list[Flow]:
    """Its peers see it at the latest when it is back."""
    victim.reset()
    others.finish()
    victim.set_up()
    attach(bed, victim)
    return [flow for kind in KINDS for flow in flowing.end_with_a_reset(kind)]


def killed(bed: Bed, victim: Guest, flowing: Streams, others: Streams) -> list[Flow]:
    """The ivshmem server tells its clients at once; on plain devices, when the guest is back."""
    victim.kill()
    ended = flowing.end_with_a_reset("doorbell")
    others.finish()
    assert_clean(bed, "doorbell")
    bed.boot(victim)
    victim.set_up()
    attach(bed, victim)
    return ended + flowing.end_with_a_reset("plain")


def attach(bed: Bed, guest: Guest) -> None:
    """Have a process of the guest attach to both devices, and see who had them before."""
    for kind in KINDS:
        guest.call(census, bed.spec(guest, kind))


def test_reset_and_killed(bed: Bed, victim: Guest, pytestconfig: pytest.Config) -> None:
    """Again and again, in mid-stream: nothing is left over, and who is not its peer is unharmed."""
    seed = random.getrandbits(32)
    rng = random.Random(seed)
    before: list[Flow] = []
    for number in range(pytestconfig.getoption("--vm-ends")):
        end = (reset, killed)[number % 2]
        print(f"seed {seed}, number {number}: {end.__name__}", flush=True)
        with (
            streams(bed, bed.host, "host") as others,
            streams(bed, victim, *PEERS) as flowing,
        ):
            time.sleep(rng.uniform(0, MOMENTS))
            ended = end(bed, victim, flowing, others)
        # The guest has slots of another generation than those before had.
        for flow in ended:
            assert (flow.path, flow.peer) not in {(old.path, old.peer) for old in before}
        before = ended
        for kind in KINDS:
            assert_clean(bed, kind)
    with streams(bed, victim, *PEERS) as flowing:
        flowing.finish()


def test_killed_and_given_up(bed: Bed, victim: Guest) -> None:
    """Nobody but an operator can say on a plain device that a guest is gone for good."""
    plain = bed.spec(bed.host, "plain")
    before, others = bed.host.call(census, plain), bed.host.call(slots_at, plain, victim.address)
    with streams(bed, victim, *PEERS) as flowing:
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
