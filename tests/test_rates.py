"""Connecting often and fast: no port runs out, and no plain server is reached more slowly."""

import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import ivsmc
from crowd import SMALL, serve_until_told
from endpoints import LOOPBACK, Endpoint
from processes import Remote, running

CONNECTS = 60_000
"""More than twice the ephemeral ports of Linux, in less time than it remembers connections."""
BATCH = 1_000
"""Connects of one batch: fewer than the servers' backlogs, so that none waits to be accepted."""
AT_LEAST = 0.8
"""Of a plain socket's rate."""

Connect = Callable[[], Endpoint]


@contextmanager
def server(device: str | None, cpu: int | None) -> Iterator[tuple[Remote, tuple[str, int]]]:
    """A server in a process of its own, on processor ``cpu``; plain without ``device``."""
    with running(serve_until_told, device, cpu) as remote:
        yield remote, remote.receive()


def end(remote: Remote, address: tuple[str, int], connects: int) -> Counter[str]:
    """End the server after ``connects``; return how many sessions it had over each transport."""
    with socket.create_connection(address) as conn:
        conn.sendall(str(connects + 1).encode())
    transports: Counter[str] = remote.receive()
    remote.receive()
    transports["tcp"] -= 1
    return +transports


@contextmanager
def pinned() -> Iterator[int | None]:
    """The client on one processor, its server on another if there are two: yields that one."""
    every = os.sched_getaffinity(0)
    mine, *others = sorted(every)
    if not others:
        yield None
        return
    os.sched_setaffinity(0, {mine})
    try:
        yield others[0]
    finally:
        os.sched_setaffinity(0, every)


def connect(address: tuple[str, int], device: str) -> ivsmc.Session:
    session = ivsmc.create_connection(address, device=device, buffer=SMALL)
    assert session.fallback_reason is None
    return session


def rate(one: Connect) -> float:
    """Connects in a second, each closed at once."""
    begin = time.perf_counter()
    for _ in range(BATCH):
        one().close()
    return BATCH / (time.perf_counter() - begin)


def ratios(address: tuple[str, int]) -> list[float]:
    """The rate of sessions to that of plain sockets, batch after batch, each first in turn."""
    found = []
    for number in range(CONNECTS // BATCH):
        rates = {}
        kinds = (socket, ivsmc) if number % 2 else (ivsmc, socket)
        for kind in kinds:
            rates[kind] = rate(lambda kind=kind: kind.create_connection(address))  # type: ignore[misc]
        found.append(rates[ivsmc] / rates[socket])
    return found


def test_a_plain_server_is_connected_to_as_fast_as_with_a_plain_socket(
    device_specs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVSMC_DEVICE", ",".join(device_specs[kind] for kind in ("local", "file")))
    with pinned() as cpu, server(None, cpu) as (remote, address):
        with ivsmc.create_connection(address) as session:
            assert session.fallback_reason is not None
            assert session.fallback_reason.name == "PEER_NO_SMC"
        connects = 2 * CONNECTS
        median = statistics.median(ratios(address))
        if median < AT_LEAST:
            # Machines do other things as well; twice in a row they do not by chance.
            median = max(median, statistics.median(ratios(address)))
            connects *= 2
        assert end(remote, address, connects + 1)["tcp"] == connects + 1
    print(f"connects to a plain server: {median:.2f} of a plain socket's rate")
    assert median >= AT_LEAST


def test_no_port_runs_out(device_specs: dict[str, str]) -> None:
    device = device_specs["local"]
    with server(device, None) as (remote, address):
        begin = time.perf_counter()
        for _ in range(CONNECTS):
            connect(address, device).close()
        seconds = time.perf_counter() - begin
        # Plain programs find ports as well.
        with socket.create_server(LOOPBACK) as other:
            for _ in range(BATCH):
                socket.create_connection(other.getsockname()).close()
                other.accept()[0].close()
        assert set(end(remote, address, CONNECTS)) == {"smc"}
    print(f"connects to an ivsmc server: {CONNECTS / seconds:.0f}/s")


def test_ports_that_plain_programs_used_are_used_again(device_specs: dict[str, str]) -> None:
    device = device_specs["local"]
    with server(None, None) as (plain, plain_address):
        for _ in range(CONNECTS // 2):
            socket.create_connection(plain_address).close()
        with server(device, None) as (remote, address):
            for _ in range(BATCH):
                connect(address, device).close()
            assert set(end(remote, address, BATCH)) == {"smc"}
        end(plain, plain_address, CONNECTS // 2)
