"""Connects per second over loopback, one server process and one client process.

A connect here is: connect, one byte from the server, close. The three rows take turns in batches,
so that what else the machine does meets all of them; each figure is the median over the batches.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import ivsmc

LOOPBACK = ("127.0.0.1", 0)


def serve(pipe: Connection, device: str | None, cpu: int | None) -> None:
    """Send one byte to every client; plain TCP without ``device``."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    listener: Any = (
        socket.create_server(LOOPBACK, backlog=1024)
        if device is None
        else ivsmc.create_server(LOOPBACK, backlog=1024, device=device)
    )
    with listener:
        pipe.send(listener.getsockname())
        while True:
            session, _ = listener.accept()
            with session:
                session.sendall(b"!")


def rate(connect: Callable[[], Any], batch: int) -> float:
    """Measure the connects per second of one batch."""
    begin = time.perf_counter()
    for _ in range(batch):
        with connect() as end:
            if end.recv(1) != b"!":
                raise RuntimeError("the server closed without a byte")
    return batch / (time.perf_counter() - begin)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="local", help="of the ivsmc row (default: local)")
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--batch", type=int, default=500, help="connects of a batch")
    options = parser.parse_args()
    client_cpu, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {client_cpu})
    context = multiprocessing.get_context("spawn")
    addresses = []
    for device in (None, options.device):
        ours, theirs = context.Pipe()
        server = context.Process(
            target=serve, args=(theirs, device, others[0] if others else None), daemon=True
        )
        server.start()
        addresses.append(ours.recv())
    plain, shared = addresses
    rows: dict[str, Callable[[], Any]] = {
        "plain socket": lambda: socket.create_connection(plain),
        "ivsmc to a plain server": lambda: ivsmc.create_connection(plain, device=options.device),
        "ivsmc to ivsmc": lambda: ivsmc.create_connection(
            shared, device=options.device, require="smc"
        ),
    }
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.batches):
        for name, connect in rows.items():
            rates[name].append(rate(connect, options.batch))
    base = statistics.median(rates["plain socket"])
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"{name:<24}{median:>9.0f}/s{median / base:>7.2f} of plain")


if __name__ == "__main__":
    main()
