"""Several processes of one guest share its device through an agent."""

import contextlib
import sys
from collections.abc import Iterator

import pytest

from vm import tasks
from vm.bed import Bed
from vm.guest import DOORBELL, VECTORS, Guest
from vm.machine import Machine
from vm.streams import (
    accept_and_exchange,
    census,
    connect_and_exchange,
    connect_flow,
    serve_flows,
    vectors,
)
from vm.talks import Path, play_rounds, serve_rounds

SOCKET = "/run/ivsmc/agent.sock"
AGENT = [sys.executable, "-m", "ivsmc", "agent", DOORBELL, "--socket", SOCKET]
SHARED = f"agent:{SOCKET}"
ROUNDS = 200
MIB = 1 << 20


@contextlib.contextmanager
def agent(machine: Machine) -> Iterator[None]:
    """An agent that shares the device of a guest."""
    with machine.running(tasks.run_server, AGENT) as agent:
        assert "is shared at" in agent.receive()
        yield
        agent.send("stop")
        assert agent.receive() == 0


@pytest.fixture(scope="module")
def sharing(bed: Bed) -> Iterator[Bed]:
    """The test bed, with an agent in each guest."""
    near, far = bed.guests
    with agent(near), agent(far):
        yield bed


@pytest.mark.parametrize("name", ["two", "host"])
def test_one_process_is_killed_and_the_other_does_not_notice(sharing: Bed, name: str) -> None:
    """Both stream to another machine; one dies in full flow, the other goes on."""
    guest, peer = sharing.guests[0], sharing.machine(name)
    spec = SHARED if isinstance(peer, Guest) else sharing.spec(peer, "doorbell")
    with (
        guest.running(serve_flows, SHARED, 1) as victim,
        guest.running(serve_flows, SHARED, 1) as other,
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
    found = guest.call(census, SHARED)
    assert (found["live"], found["dead"], found["dmbs_held"]) == (1, 0, 0)


def test_doorbells_wake_sleepers(sharing: Bed) -> None:
    """Also those processes that have to share the last vector."""
    near, far = sharing.guests
    with contextlib.ExitStack() as serving:
        servers = [
            serving.enter_context(far.running(serve_rounds, SHARED, ROUNDS, False, 0.0))
            for _ in range(VECTORS)
        ]
        ports = [server.receive() for server in servers]
        # The first vector is the agent's own.
        assert far.call(vectors, SHARED) == [*range(1, VECTORS), VECTORS - 1]
        for server, port in zip(servers, ports, strict=True):
            near_end = near.call(play_rounds, SHARED, (far.address, port), ROUNDS, False, 0.0)
            for end in (near_end, server.receive()):
                print(end)
                end.assert_by_doorbell(ROUNDS)


def test_agents_are_found(sharing: Bed) -> None:
    """By processes that name no device, though another one is there, too."""
    near, far = sharing.guests
    with far.running(accept_and_exchange, None, MIB) as accepting:
        address = (far.address, accepting.receive())
        ends = near.call(connect_and_exchange, None, address, MIB), accepting.receive()
    assert ends == (Path("smc", SHARED, None),) * 2
