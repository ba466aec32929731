"""Many sessions at once: all of them carry data, give everything back, and cost nothing idle."""

import os
import random
from contextlib import ExitStack
from pathlib import Path

import ivsmc
from crowd import (
    SMALL,
    Holdings,
    allow_descriptors,
    answer_all,
    cpu_while_idle,
    hold_idle,
    observer,
    waiting,
    warm_up,
)
from endpoints import LOOPBACK, receive_exactly
from processes import Remote, running

SESSIONS = 1000
MESSAGE = 4096
"""Bytes on each session at once, each way: less than a buffer, so that one thread can do it."""
ROUNDS = 5

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


def test_a_thousand_sessions_at_once(shared_device: str) -> None:
    allow_descriptors(4 * SESSIONS)
    with observer(shared_device) as census:
        before = census()
        memory_before = memory(shared_device)
        with (
            ivsmc.open_device(shared_device) as device,
            running(answer_all, shared_device, SESSIONS) as far,
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
                    for _ in range(SESSIONS)
                ]
                assert {session.transport for session in sessions} == {"smc"}
                assert far.receive() == {"smc"}
                held = device.census()
                assert held["dmbs_held"] - before["dmbs_held"] == 2 * SESSIONS
                assert held["dmbs_attached"] - before["dmbs_attached"] == 2 * SESSIONS
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
        assert memory(shared_device) - memory_before < SESSIONS * SMALL // 16


def exchange_on_all(sessions: list[ivsmc.Session], far: Remote, seed: int) -> None:
    """Send something else on each session, and see it come back in reverse."""
    data = random.Random(seed).randbytes(MESSAGE + len(sessions))
    sent = [data[number : number + MESSAGE] for number in range(len(sessions))]
    for session, message in zip(sessions, sent, strict=True):
        session.sendall(message)
    far.send(MESSAGE)
    for session, message in zip(sessions, sent, strict=True):
        assert receive_exactly(session, MESSAGE) == message[::-1]


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
