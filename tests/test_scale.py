"""Many sessions at once: all of them carry data, give everything back, and cost nothing idle."""

import os
import random
from contextlib import ExitStack
from pathlib import Path

import pytest

import ivsmc
from crowd import (
    MESSAGE,
    SMALL,
    SPARE,
    Holdings,
    Weight,
    allow_descriptors,
    answer_all,
    breed,
    cpu_while_idle,
    hold_idle,
    observer,
    waiting,
    warm_up,
    warm_up_alone,
    weigh_when_asked,
)
from endpoints import LOOPBACK, receive_exactly
from processes import Remote, running

ROUNDS = 5

GROWTH = 1 << 20
"""Bytes by which the memory of a process may grow, whatever it does."""

IDLE_SESSIONS = 200
IDLE_LISTENERS = 20
IDLE_SECONDS = 3.0
IDLE_SHARE = 0.02
"""Of one processor. A busy poll of a single session would take fifty times as much."""


def memory(device: str) -> int:
    """Bytes that the region of ``device`` occupies, if it is ours to make larger and smaller."""
    if device != "local":
        return 0
    region = Path(os.environ["IVSMC_LOCAL_DIR"], f"ivsmc-{os.getuid()}", "region")
    return 512 * region.stat().st_blocks


def test_many_sessions_at_once(shared_device: str, pytestconfig: pytest.Config) -> None:
    count: int = pytestconfig.getoption("--sessions")
    allow_descriptors(count + SPARE)
    with observer(shared_device) as census:
        before = census()
        memory_before = memory(shared_device)
        with (
            ivsmc.open_device(shared_device) as device,
            running(answer_all, shared_device, count) as far,
        ):
            address = far.receive()
            with ivsmc.create_connection(address, device=shared_device) as first:
                warm_up(first)
                assert far.receive() == "warm"
            here_before = Holdings.now()
            with ExitStack() as opened:
                sessions = [
                    opened.enter_context(
                        ivsmc.create_connection(address, device=shared_device, buffer=SMALL)
                    )
                    for _ in range(count)
                ]
                assert {session.transport for session in sessions} == {"smc"}
                assert far.receive() == {"smc"}
                held = device.census()
                assert held["dmbs_held"] - before["dmbs_held"] == 2 * count
                assert held["dmbs_attached"] - before["dmbs_attached"] == 2 * count
                for seed in range(ROUNDS):
                    exchange_on_all(sessions, far, seed)
            far.send(0)
            there_before, there_after = far.receive()
            assert not there_after.grown_since(there_before)
            assert not Holdings.now().grown_since(here_before)
            far.send(None)
            far.receive()
        assert census() == before
        # Control blocks stay, a fiftieth of the rings.
        assert memory(shared_device) - memory_before < count * SMALL // 16


def exchange_on_all(sessions: list[ivsmc.Session], far: Remote, seed: int) -> None:
    """Send something else on each session, and see it come back in reverse."""
    data = random.Random(seed).randbytes(MESSAGE + len(sessions))
    sent = [data[number : number + MESSAGE] for number in range(len(sessions))]
    for session, message in zip(sessions, sent, strict=True):
        session.sendall(message)
    far.send(MESSAGE)
    for session, message in zip(sessions, sent, strict=True):
        assert receive_exactly(session, MESSAGE) == message[::-1]


def test_many_processes_at_once(device_specs: dict[str, str], pytestconfig: pytest.Config) -> None:
    """Each has a slot, an extent and a session of its own; half of them are killed at the end."""
    device, count = device_specs["local"], pytestconfig.getoption("--processes")
    with observer(device) as census:
        before = census()
        with ivsmc.open_device(device) as opened, running(answer_all, device, count) as far:
            address = far.receive()
            with ivsmc.create_connection(address, device=device) as first:
                warm_up(first)
                assert far.receive() == "warm"
            with running(breed, device, address, count) as crowd:
                assert crowd.receive() == count
                assert far.receive() == {"smc"}
                held = opened.census()
                assert held["live"] - before["live"] == count + 2
                assert held["dmbs_attached"] - before["dmbs_attached"] == 2 * count
                for _ in range(ROUNDS):
                    crowd.send("exchange")
                    far.send(MESSAGE)
                    assert crowd.receive() == count
                crowd.send(None)
                crowd.receive()
            far.send(0)
            far.receive()
            far.send(None)
            far.receive()
        assert census() == before


def test_what_connects_and_closes_leaves_nothing(
    shared_device: str, pytestconfig: pytest.Config
) -> None:
    """Neither memory nor descriptors, at either end."""
    count: int = pytestconfig.getoption("--connects")
    with observer(shared_device) as census:
        before = census()
        with running(weigh_when_asked, shared_device) as far, ivsmc.open_device(shared_device):
            address = far.receive()

            def connect(times: int) -> None:
                for number in range(times):
                    text = b"%d" % number
                    with ivsmc.create_connection(
                        address, device=shared_device, buffer=SMALL
                    ) as session:
                        session.sendall(text)
                        assert receive_exactly(session, len(text)) == text

            def weigh() -> tuple[Weight, Weight]:
                with ivsmc.create_connection(address, device=shared_device) as session:
                    session.sendall(b"weigh")
                there: Weight = far.receive()
                return Weight.now(), there

            # What is kept for the next session is there after these.
            warm_up_alone(shared_device)
            connect(max(count // 5, 500))
            weights = weigh()
            connect(count)
            for first, last in zip(weights, weigh(), strict=True):
                grown = last.private - first.private
                print(f"{shared_device.split(':')[0]}: {grown} bytes of {first.private} more")
                assert not last.holdings.grown_since(first.holdings)
                assert grown < GROWTH
            with ivsmc.create_connection(address, device=shared_device) as session:
                session.sendall(b"stop")
            far.receive()
        assert census() == before


def test_idle_sessions_and_listeners_use_no_processor(device: str) -> None:
    allow_descriptors(4 * (IDLE_SESSIONS + IDLE_LISTENERS))
    with running(hold_idle, device, IDLE_LISTENERS, IDLE_SESSIONS, IDLE_SECONDS) as far:
        address = far.receive()
        with ExitStack() as opened:
            sessions = [
                opened.enter_context(ivsmc.create_connection(address, device=device, buffer=SMALL))
                for _ in range(IDLE_SESSIONS)
            ]
            listeners = [
                opened.enter_context(ivsmc.create_server(LOOPBACK, device=device, buffer=SMALL))
                for _ in range(IDLE_LISTENERS)
            ]
            expected = "tcp" if device == "none" else "smc"
            assert far.receive() == {expected}
            # They have been used before.
            for session in sessions:
                session.sendall(b"x")
                assert session.recv(1) == b"x"
            with waiting(listeners[1], sessions[0], listeners[2], sessions[1]) as ended:
                far.send("idle")
                here = cpu_while_idle(IDLE_SECONDS)
                assert ended == []
                there = far.receive()
                far.send("end")
            far.receive()
        print(f"{device}: {here:.4f} s and {there:.4f} s of {IDLE_SECONDS} s")
        assert max(here, there) < IDLE_SHARE * IDLE_SECONDS
