"""Sessions between two guests, and between a guest and the host, on both kinds of device."""

import pytest

from vm.bed import Bed
from vm.streams import accept_and_exchange, accept_many, connect_and_exchange, connect_many
from vm.talks import Path, Wakes, play_rounds, serve_rounds

MIB = 1 << 20
SESSIONS = 50
ROUNDS = 300
PAUSE = 0.01
"""Seconds the host thinks before it sends: guests, so much slower, would else seldom sleep."""

WAYS = [("one", "two"), ("two", "one"), ("one", "host"), ("host", "one")]
"""Who connects, to whom."""


@pytest.fixture(params=["doorbell", "plain"])
def kind(request: pytest.FixtureRequest) -> str:
    """The device of the guests, each in turn."""
    return str(request.param)


@pytest.fixture(params=WAYS, ids=["-".join(way) for way in WAYS])
def way(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Who connects, to whom."""
    client, server = request.param
    return client, server


def test_streams_both_ways_at_once(bed: Bed, kind: str, way: tuple[str, str]) -> None:
    """Bit for bit."""
    near, far = (bed.machine(name) for name in way)
    total = 8 * MIB if "host" in way else 64 * MIB
    with far.running(accept_and_exchange, bed.spec(far, kind), total) as accepting:
        address = (far.address, accepting.receive())
        paths = near.call(connect_and_exchange, bed.spec(near, kind), address, total)
        assert paths == Path("smc", bed.spec(near, kind), None)
        assert accepting.receive() == Path("smc", bed.spec(far, kind), None)


def test_fifty_sessions_at_once(bed: Bed, kind: str) -> None:
    near, far = bed.guests
    with far.running(accept_many, bed.spec(far, kind), SESSIONS, 4096) as accepting:
        address = (far.address, accepting.receive())
        paths = near.call(connect_many, bed.spec(near, kind), address, SESSIONS, 64 * 1024)
        assert paths == {Path("smc", bed.spec(near, kind), None)}
        assert accepting.receive() is None


def play(bed: Bed, kind: str, way: tuple[str, str], *, busy: bool) -> tuple[Wakes, Wakes]:
    """Rounds of one byte; what both ends say of it."""
    near, far = (bed.machine(name) for name in way)
    thinks = [PAUSE if name == "host" and not busy else 0.0 for name in way]
    with far.running(serve_rounds, bed.spec(far, kind), ROUNDS, busy, thinks[1]) as serving:
        address = (far.address, serving.receive())
        ends = (
            near.call(play_rounds, bed.spec(near, kind), address, ROUNDS, busy, thinks[0]),
            serving.receive(),
        )
    print(*ends, sep="\n")
    return ends


def test_doorbells_wake_sleepers(bed: Bed, way: tuple[str, str]) -> None:
    """And hardly a byte goes over TCP for that."""
    for end in play(bed, "doorbell", way, busy=False):
        end.assert_by_doorbell(ROUNDS)


def test_busy_ends_are_not_interrupted(bed: Bed, way: tuple[str, str]) -> None:
    for end in play(bed, "doorbell", way, busy=True):
        assert end.interrupts < ROUNDS // 10
        assert end.stats["doorbells_sent"] < ROUNDS // 10
        assert end.stats["wakes_sent"] < ROUNDS // 10


def test_sleepers_of_plain_devices_are_woken_over_tcp(bed: Bed, way: tuple[str, str]) -> None:
    for end in play(bed, "plain", way, busy=False):
        assert end.stats["wakes_sent"] >= ROUNDS // 2
