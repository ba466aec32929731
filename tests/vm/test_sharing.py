"""Several processes of one guest share its device through an agent."""

import contextlib
import sys
from collections.abc import Iterator

import pytest

from vm import tasks
from vm.bed import Bed
from vm.guest import DOORBELL, Guest
from vm.machine import Machine
from vm.streams import census, connect_flow, serve_flows

SOCKET = "/run/ivsmc/agent.sock"
AGENT = [sys.executable, "-m", "ivsmc", "agent", DOORBELL, "--socket", SOCKET]
SHARED = f"agent:{SOCKET}"


@contextlib.contextmanager
def sharing(bed: Bed, machine: Machine) -> Iterator[str]:
    """The device of several processes of a machine: behind an agent, if it is a guest."""
    if not isinstance(machine, Guest):
        yield bed.spec(machine, "doorbell")
        return
    with machine.running(tasks.run_server, AGENT) as agent:
        assert "is shared at" in agent.receive()
        yield SHARED
        agent.send("stop")
        assert agent.receive() == 0


@pytest.mark.parametrize("name", ["two", "host"])
def test_one_process_is_killed_and_the_other_does_not_notice(bed: Bed, name: str) -> None:
    """Both stream to another machine; one dies in full flow, the other goes on."""
    guest, peer = bed.guests[0], bed.machine(name)
    with sharing(bed, peer) as spec, sharing(bed, guest) as shared:
        with (
            guest.running(serve_flows, shared, 1) as victim,
            guest.running(serve_flows, shared, 1) as other,
        ):
            places = [(guest.address, job.receive()) for job in (victim, other)]
            with (
                peer.running(connect_flow, spec, places[0]) as to_victim,
                peer.running(connect_flow, spec, places[1]) as to_other,
            ):
                assert {to_victim.receive(), to_other.receive()} == {"flows"}
                victim.kill()
                assert "ConnectionResetError" in to_victim.receive().ends
                for job in (to_other, other):
                    job.send("end")
                near = to_other.receive()
                [far] = other.receive()
                assert near.ends == far.ends == ("done", "done")
                assert (near.sent, near.received) == (far.received, far.sent)
        # The agent has taken back what the killed one held; it holds nothing itself.
        found = guest.call(census, shared)
        assert (found["live"], found["dead"], found["dmbs_held"]) == (1, 0, 0)
