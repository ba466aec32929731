"""The ivshmem server is killed while guests stream. All later tests go on with its successors."""

from vm import tasks
from vm.bed import Bed
from vm.streams import connect_flow, serve_flows
from vm.talks import play_rounds, serve_rounds

KILLS = 3
ROUNDS = 100
IDS = 20
"""More clients than there ever were before: who joins then has an id that no guest has heard of."""


def test_guests_stream_on_and_hear_of_newcomers(bed: Bed) -> None:
    one, two = bed.guests
    with one.running(serve_flows, bed.spec(one, "doorbell"), 3) as serving:
        address = (one.address, serving.receive())
        with (
            two.running(connect_flow, bed.spec(two, "doorbell"), address) as guest,
            bed.host.running(connect_flow, bed.spec(bed.host, "doorbell"), address) as host,
        ):
            assert guest.receive() == host.receive() == "flows"
            for _ in range(KILLS):
                bed.kill_server()
            # A newcomer streams with a guest that has seen no ivshmem server but the first.
            spec = bed.spec(bed.host, "doorbell")
            with bed.host.running(connect_flow, spec, address) as newcomer:
                assert newcomer.receive() == "flows"
                jobs = (guest, host, newcomer)
                for job in (*jobs, serving):
                    job.send("end")
                near = [job.receive() for job in jobs]
                far = serving.receive()
    assert {flow.ends for flow in (*near, *far)} == {("done", "done")}
    passed = sorted((flow.sent, flow.received) for flow in near)
    assert passed == sorted((flow.received, flow.sent) for flow in far)


def test_a_newcomer_and_a_guest_wake_each_other_by_doorbells(bed: Bed) -> None:
    one, host = bed.guests[0], bed.host
    bed.kill_server()
    with host.running(tasks.hold_ids, bed.server, IDS) as holding:
        assert holding.receive() == "there"
        with one.running(serve_rounds, bed.spec(one, "doorbell"), ROUNDS, False, 0.0) as serving:
            address = (one.address, serving.receive())
            spec = bed.spec(host, "doorbell")
            near = host.call(play_rounds, spec, address, ROUNDS, False, 0.01)
            far = serving.receive()
        holding.send("end")
        holding.receive()
    print(near, far, sep="\n")
    for end in (near, far):
        assert end.stats["doorbells_sent"] >= ROUNDS // 2
        assert end.stats["doorbells_received"] >= ROUNDS // 2
        assert end.stats["wakes_sent"] < ROUNDS // 10
