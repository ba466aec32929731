"""Containers of one machine that show a boot id of their own: none takes another for dead.

Without the kernel's boot id nothing tells a container's process from one before a reboot.
"""

import contextlib
from pathlib import Path

import pytest

import containers
import ivsmc
import victims
from endpoints import LOOPBACK, receive_exactly
from processes import running
from random_stream import RandomStream
from test_death import assert_clean

SOME = 1_000_000
"""Bytes of a stream, many times what its ring holds at ``BUFFER``."""
BUFFER = 1 << 16


@pytest.fixture(autouse=True)
def _root() -> None:
    containers.need_root()


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return tmp_path / "boot_id"


def test_a_container_takes_nothing_from_its_host(shared_device: str, mask: Path) -> None:
    with ivsmc.create_server(LOOPBACK, device=shared_device, buffer=BUFFER) as listener:
        address = listener.getsockname()
        with running(victims.stream, shared_device, address, False) as remote:
            session, _ = listener.accept()
            with session:
                assert session.transport == "smc"
                stream = RandomStream(victims.SEED)
                assert receive_exactly(session, SOME) == stream.take(SOME)
                with running(containers.look, mask, shared_device) as container:
                    reaped, slots = container.receive()
                assert reaped == 0
                others = [slot for slot in slots if not slot["own"]]
                assert [slot["state"] for slot in others] == ["live", "live"]
                for slot in slots:
                    # It cannot tell, and so has proved nothing.
                    assert (slot["same_boot"], slot["same_machine"]) == (None, None)
                session.send(b"!")
                assert remote.receive() == "streaming"
                assert receive_exactly(session, SOME) == stream.take(SOME)
                remote.kill()


def test_the_host_takes_nothing_from_a_container(shared_device: str, mask: Path) -> None:
    with (
        contextlib.closing(ivsmc.open_device(shared_device)) as outside,
        running(containers.serve, mask, shared_device) as server,
    ):
        address = server.receive()
        pid = server.process.pid
        with running(containers.receive, mask, shared_device, address, pid) as client:
            # Those of one container do reach each other.
            assert client.receive() == "smc"
            for _ in range(2):
                for end in (server, client):
                    end.send(SOME)
                assert client.receive() == "received"
                assert outside.reap() == 0
                assert [slot["state"] for slot in outside.slots()] == ["live"] * 3
                assert {slot["same_boot"] for slot in outside.slots()} == {True, None}
            # One is seen to be dead all the same: from outside, too.
            server.kill()
            client.kill()
        outside.reap()
        assert_clean(outside)


def test_one_container_takes_nothing_from_another(
    shared_device: str, mask: Path, tmp_path: Path
) -> None:
    with running(containers.serve, mask, shared_device) as server:
        server.receive()
        for name in ("second", "third"):
            with running(containers.look, tmp_path / name, shared_device) as other:
                reaped, slots = other.receive()
            assert (reaped, [slot["state"] for slot in slots]) == (0, ["live"] * 2)
        server.kill()
        # But the dead, any container sees.
        with running(containers.look_until_clean, tmp_path / "fourth", shared_device) as other:
            assert other.receive() is None


def test_between_a_container_and_its_host_loopback_is_tcp(shared_device: str, mask: Path) -> None:
    """Their network is the same, but neither can know that."""
    with ivsmc.create_server(LOOPBACK, device=shared_device) as listener:
        address = listener.getsockname()
        with running(containers.connect, mask, shared_device, address) as container:
            session, _ = listener.accept()
            with session:
                assert receive_exactly(session, 8) == b"over TCP"
                assert session.transport == "tcp"
            assert container.receive() == ("tcp", "PEER_NO_SMC")
