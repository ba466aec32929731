"""``host:`` on an ivshmem server that behaves as QEMU's own does."""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivsmc
from endpoints import LOOPBACK, receive_exactly
from peers import connect_and_echo, exchange_with_client
from processes import Remote, running
from random_stream import exchange
from reference_server import running_reference

REGION_BYTES = 16 << 20
VECTORS = 2
NEWCOMERS = 5
TOTAL = 4_000_000
TRIES = 10_000
"""Looks, of a millisecond each, until something must be so."""


@pytest.fixture
def reference() -> Iterator[tuple[Remote, str]]:
    """One that runs, and the device that it makes."""
    with tempfile.TemporaryDirectory(prefix="ivsmc-reference-") as directory:
        with running_reference(Path(directory, "ivs.sock"), REGION_BYTES, VECTORS) as reference:
            yield reference


def ids(server: Remote) -> list[int]:
    server.send("ids")
    found: list[int] = server.receive()
    return found


def test_streams(reference: tuple[Remote, str]) -> None:
    _, device = reference
    with running(exchange_with_client, device, 5, 6, TOTAL) as remote:
        with ivsmc.create_connection(remote.receive(), device=device, require="smc") as session:
            exchange(session, 6, 5, TOTAL)
        assert remote.receive() == "smc"


def test_newcomers_and_leavers_while_others_stay(reference: tuple[Remote, str]) -> None:
    """Each has the next id; the sessions of those that stay go on."""
    server, device = reference
    with contextlib.ExitStack() as staying:
        listener = staying.enter_context(ivsmc.create_server(LOOPBACK, device=device))
        address = listener.getsockname()
        assert ids(server) == [0]
        first = staying.enter_context(running(connect_and_echo, device, address))
        session = staying.enter_context(listener.accept()[0])
        for number in range(2, 2 + NEWCOMERS):
            with running(connect_and_echo, device, address) as newcomer:
                with listener.accept()[0] as other:
                    assert other.transport == session.transport == "smc"
                    assert ids(server) == [0, 1, number]
                    for each in (session, other):
                        each.sendall(b"here")
                        assert receive_exactly(each, 4) == b"here"
                assert newcomer.receive() == "smc"
        session.close()
        assert first.receive() == "smc"


def test_killed(reference: tuple[Remote, str]) -> None:
    """Nobody marks it, but its lock tells: a reset for its peer, and its memory comes back."""
    server, device = reference
    with contextlib.closing(ivsmc.open_device(device)) as region:
        with ivsmc.create_server(LOOPBACK, device=device) as listener:
            with running(connect_and_echo, device, listener.getsockname()) as remote:
                with listener.accept()[0] as session:
                    session.sendall(b"here")
                    assert receive_exactly(session, 4) == b"here"
                    remote.kill()
                    with pytest.raises(ConnectionResetError):
                        session.recv(1)
        for _ in range(TRIES):
            census = region.census()
            if census["live"] == 1 and census["dmbs_held"] == census["dmbs_attached"] == 0:
                break
            time.sleep(0.001)
        assert census["live"] == 1, census
        assert census["dmbs_held"] == census["dmbs_attached"] == census["dead"] == 0, census
        assert ids(server) == [0]
