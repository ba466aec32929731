"""Processes short of descriptors and file systems short of room: clear errors, and it goes on."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import ivsmc
import limits
from containers import need_root
from crowd import Holdings
from forking import forked, ignore_threads
from ivsmc import _native
from processes import running

DESCRIPTORS = 32
"""More than opening any of the tests' devices and connecting take."""
SHORTAGE = "Too many open files"
SECONDS = 1.0
IDLE_SHARE = 0.05
"""Of one processor, while a client waits that cannot be accepted."""


@ignore_threads
def test_clients_short_of_descriptors(shared_device: str) -> None:
    """Whichever of the descriptors it takes from the first to the last is not to be had."""
    with running(limits.answer, shared_device) as far:
        address = far.receive()
        assert _native.shutdown()  # the children open the device themselves
        with ExitStack() as children:
            asking = [
                children.enter_context(forked(limits.ask_with, count, address, shared_device))
                for count in range(DESCRIPTORS)
            ]
            outcomes = [child.result() for child in asking]
        assert limits.ask(address, shared_device, b"stop")[0] == "smc"
        far.receive()
    firsts = [first for first, _ in outcomes]
    print(*dict.fromkeys(firsts), sep="\n")
    assert firsts[0] == ("OSError", f"[Errno 24] {SHORTAGE}")
    for first in firsts:
        assert first[0] == "smc" or SHORTAGE in first[1], first
    assert firsts[-1][0] == "smc"
    assert {then for _, then in outcomes} == {("smc", "None")}


@ignore_threads
def test_listeners_short_of_descriptors(shared_device: str) -> None:
    with ExitStack() as children:
        assert _native.shutdown()
        listening = [
            children.enter_context(forked(limits.listen_with, count, shared_device))
            for count in range(DESCRIPTORS)
        ]
        outcomes = [child.result() for child in listening]
    print(*dict.fromkeys(outcomes), sep="\n")
    assert outcomes[0] == ("OSError", f"[Errno 24] {SHORTAGE}")
    for what, why in outcomes:
        assert what == "listening" or SHORTAGE in why
    assert outcomes[-1][0] == "listening"


def test_a_client_without_a_descriptor(shared_device: str) -> None:
    """Is told so at once, keeps nothing, and connects when it has one again."""
    with running(limits.answer, shared_device) as far:
        address = far.receive()
        with ivsmc.open_device(shared_device):
            assert limits.ask(address, shared_device) == ("smc", "None")
            before = Holdings.now()
            with limits.descriptors_left(0):
                assert limits.ask(address, shared_device) == ("OSError", f"[Errno 24] {SHORTAGE}")
            assert not Holdings.now().grown_since(before)
            assert limits.ask(address, shared_device, b"stop") == ("smc", "None")
        far.receive()


def test_accepting_without_a_descriptor(shared_device: str) -> None:
    """Is an error as a socket's is, costs no processor, and loses no client."""
    with running(limits.accept_with_none, shared_device, SECONDS) as far:
        address = far.receive()
        assert limits.ask(address, shared_device, b"")[0] == "smc"
        assert far.receive() == "none left"
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(limits.ask, address, shared_device)
            time.sleep(0.1)
            far.send("asked")
            assert far.receive() == "enough"
            transport, why = asked.result()
        print(transport, why)
        assert transport in {"smc", "tcp"}
        assert far.receive() < IDLE_SHARE * SECONDS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    need_root()
    return tmp_path


def test_no_room_at_all(root: Path) -> None:
    """Is a fallback where devices are found, an error where one is named, and not for ever."""
    with running(limits.on_a_small_file_system, root, 16 << 20, "full before") as far:
        fallen_back, named, then = far.receive()
    assert fallen_back[0] == "tcp"
    assert "NO_DEVICE" in fallen_back[1]
    assert "make /dev/shm larger" in fallen_back[1]
    assert named[0] == "DeviceError"
    assert "make /dev/shm larger" in named[1]
    assert then == ("smc", "None")


@pytest.mark.parametrize("size", [16 << 20, 200 << 20])
def test_no_room_any_more(root: Path, size: int) -> None:
    """Sessions that have their memory go on, and later ones have some when there is room."""
    with running(limits.on_a_small_file_system, root, size, "full meanwhile") as far:
        last, new = far.receive()
    assert last[0] == "tcp"
    assert "REGION_FULL" in last[1]
    assert new == ("smc", "None")
