"""Processes that see another boot id than their kernel's, as containers of LXC do."""

import ctypes
import os
import uuid
from pathlib import Path

import pytest

import ivsmc
import victims
from endpoints import receive_exactly
from processes import Here
from random_stream import RandomStream
from test_death import assert_clean

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NEW_NAMESPACE = 0x00020000
"""``CLONE_NEWNS`` of ``linux/sched.h``."""
BIND = 0x1000
"""``MS_BIND`` of ``linux/mount.h``."""
PRIVATE_BELOW = 0x4000 | 0x40000
"""``MS_REC | MS_PRIVATE``"""


def need_root() -> None:
    """Skip the test if this user may not make mount namespaces."""
    if os.geteuid() != 0:
        pytest.skip("mounting over the boot id needs root")


def enter_container(mask: Path, neighbour: int | None = None) -> None:
    """Have this process see ``mask`` as the boot id, or what the process ``neighbour`` sees."""
    kernels = BOOT_ID.read_text()
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    if neighbour is None:
        check(libc.unshare(NEW_NAMESPACE))
        check(libc.mount(b"none", b"/", None, PRIVATE_BELOW, None))
        mask.write_text(f"{uuid.uuid4()}\n")
        check(libc.mount(bytes(mask), bytes(BOOT_ID), None, BIND, None))
    else:
        with Path(f"/proc/{neighbour}/ns/mnt").open() as namespace:
            check(libc.setns(namespace.fileno(), NEW_NAMESPACE))
    assert BOOT_ID.read_text() != kernels


def look(_here: Here, mask: Path, device: str) -> tuple[int, list[dict[str, object]]]:
    """Look for dead peers; return how many there were, and who is left."""
    enter_container(mask)
    with ivsmc.open_device(device) as attached:
        return attached.reap(), attached.slots()


def look_until_clean(_here: Here, mask: Path, device: str) -> None:
    """Look for dead peers until nobody else is there."""
    enter_container(mask)
    with ivsmc.open_device(device) as attached:
        attached.reap()
        assert_clean(attached)


def connect(_here: Here, mask: Path, device: str, address: tuple[str, int]) -> tuple[str, str]:
    """Connect to ``address``, outside; return over what, and why."""
    enter_container(mask)
    with ivsmc.create_connection(address, device=device) as session:
        reason = session.fallback_reason
        session.sendall(b"over TCP")
        return session.transport, reason.name if reason else ""


def serve(here: Here, mask: Path, device: str) -> None:
    """Stream to who connects, from the container."""
    enter_container(mask)
    with ivsmc.create_server(("127.0.0.1", 0), device=device) as listener:
        here.send(listener.getsockname())
        session, _ = listener.accept()
    data = RandomStream(victims.SEED)
    with session:
        while size := here.receive():
            session.sendall(data.take(size))


def receive(here: Here, mask: Path, device: str, address: tuple[str, int], neighbour: int) -> None:
    """Receive a stream in the container of ``neighbour``."""
    enter_container(mask, neighbour)
    data = RandomStream(victims.SEED)
    with ivsmc.create_connection(address, device=device) as session:
        here.send(session.transport)
        while size := here.receive():
            assert receive_exactly(session, size) == data.take(size)
            here.send("received")
