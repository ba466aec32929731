"""``ivsmc bench``: ivsmc against other transports, in one run, as one table.

On one machine against TCP loopback and an AF_UNIX stream; between two processes started by hand,
which may be on two machines, against TCP to the same address.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
from typing import Any

import ivsmc
from ivsmc import _native
from ivsmc._cli import between, measure
from ivsmc._cli.arguments import (
    Commands,
    add_transport_options,
    address,
    bounded,
    shown,
    size,
)
from ivsmc._cli.between import Far

_LABELS = {"ivsmc": "ivsmc", "tcp": "TCP loopback", "unix": "AF_UNIX stream"}
_PORT = 9700
_SPIN_US = 20_000
"""Microseconds that the spinning end looks before it sleeps: longer than a host takes to run a
virtual machine again that it had stopped for another."""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure ivsmc against TCP loopback and AF_UNIX",
        description="Measure round trips of 64 bytes and a stream of 64 KiB blocks between two "
        "processes, each pinned to a core of its own where there are two, over every transport "
        "in the same run. The rounds of the transports alternate; percentiles are over all "
        "rounds, throughput is the median round. All data is checked. With --listen at one end "
        "and --connect at the other it runs between two machines: ivsmc against TCP to the same "
        "port, spinning (looking again for up to 20 ms before sleeping) and sleeping at once.",
    )
    between_two = parser.add_mutually_exclusive_group()
    between_two.add_argument(
        "--listen",
        type=address,
        nargs="?",
        const=("", _PORT),
        metavar="[HOST:]PORT",
        help=f"be the other end, for one --connect after the other (default: port {_PORT})",
    )
    between_two.add_argument(
        "--connect",
        type=address,
        metavar="HOST:PORT",
        help="measure against an ivsmc bench --listen",
    )
    parser.add_argument(
        "--round-trips",
        type=bounded(100, 10_000_000),
        default=20_000,
        metavar="N",
        help="round trips per round (default: %(default)s)",
    )
    parser.add_argument(
        "--bytes",
        type=size,
        default=size("512M"),
        metavar="SIZE",
        help="bytes of the stream per round, K, M or G (default: 512M)",
    )
    parser.add_argument(
        "--rounds", type=bounded(1, 100), default=3, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--transports",
        default=",".join(measure.TRANSPORTS),
        metavar="LIST",
        help="which to measure on one machine (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_transport_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
    if options.listen is not None:
        return between.listen(options.listen, options.device, options.require)
    transports = list(dict.fromkeys(options.transports.split(",")))
    if unknown := [name for name in transports if name not in measure.TRANSPORTS]:
        options.parser.error(f"unknown transport {unknown[0]!r}; known: {', '.join(_LABELS)}")
    plan = measure.Plan(
        message=64,
        round_trips=options.round_trips,
        block=64 * 1024,
        stream_bytes=max(options.bytes // 65536, 1) * 65536,
        checked_bytes=min(options.bytes, 64 * 1024 * 1024),
    )
    if options.connect is not None:
        report = _measure_between(plan, options)
    else:
        report = _measure(transports, plan, options)
    print(json.dumps(report, indent=2) if options.json else table(report))
    return 0


class _Leg:
    """One row of the table: a way to move bytes, and what was measured of it."""

    def __init__(self, name: str, label: str, other: measure.Other, mode: str | None) -> None:
        self.name = name
        self.label = label
        self.mode = mode
        self.other = other
        self.trips: list[int] = []
        self.speeds: list[float] = []
        self.checked = 0
        self.counters: dict[str, int] = {}

    def measure_round(self, plan: measure.Plan, where: str) -> None:
        """Measure round trips and a stream."""
        before = _counters(self.other.stream)
        _progress(f"{where}: {self.label}, round trips")
        self.trips.extend(measure.round_trips(self.other, plan))
        _progress(f"{where}: {self.label}, stream")
        self.speeds.append(measure.throughput(self.other, plan))
        for name, value in _counters(self.other.stream).items():
            self.counters[name] = self.counters.get(name, 0) + value - before[name]

    def result(self) -> dict[str, Any]:
        """Return the row."""
        stream = self.other.stream
        session = stream if isinstance(stream, ivsmc.Session) else None
        reason = session.fallback_reason if session else None
        samples = sorted(self.trips)
        return {
            "name": self.name,
            "mode": self.mode,
            "label": f"{self.label} ({session.transport})" if session else self.label,
            "transport": session.transport if session else self.name,
            "device": session.stats()["device"] if session else None,
            "fallback_reason": str(reason) if reason else None,
            "round_trip_p50_us": samples[len(samples) // 2] / 1000,
            "round_trip_p99_us": samples[len(samples) * 99 // 100] / 1000,
            "bytes_per_second": statistics.median(self.speeds),
            "checked_bytes": self.checked,
            "counters": self.counters,
        }


def _counters(stream: measure.Stream) -> dict[str, int]:
    """Return what a session counts of its waiting and waking, at this end."""
    if not isinstance(stream, ivsmc.Session):
        return {}
    words = ("wakes_", "doorbells_", "sleeps")
    return {name: value for name, value in stream.stats().items() if name.startswith(words)}


def _measure(
    transports: list[str], plan: measure.Plan, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure on this machine."""
    pinned = measure.cores()
    cores = os.sched_getaffinity(0)
    limits: list[tuple[float, float]] = []
    with contextlib.ExitStack() as cleanup:
        if pinned:
            os.sched_setaffinity(0, {pinned[0]})
            cleanup.callback(os.sched_setaffinity, 0, cores)
        legs: list[_Leg] = []
        for name in transports:
            _progress(f"{_LABELS[name]}: checking data")
            core = pinned[1] if pinned else None
            peer = measure.Peer(name, core, options.device, options.require)
            cleanup.callback(peer.close)
            legs.append(_Leg(name, _LABELS[name], peer, None))
            legs[-1].checked = measure.check(peer, plan)
        for number in range(1, options.rounds + 1):
            for leg in legs:
                leg.measure_round(plan, f"round {number} of {options.rounds}")
            if pinned:
                _progress(f"round {number} of {options.rounds}: the machine's limit")
                limits.append(_native.bare_limit(pinned, plan.round_trips, plan.stream_bytes))
        _progress("")
        results = [leg.result() for leg in legs]
    bare = None
    if limits:
        trip, speed = (statistics.median(figures) for figures in zip(*limits, strict=True))
        bare = {"round_trip_us": trip, "bytes_per_second": speed}
    where = f"pinned to cores {pinned[0]} and {pinned[1]}" if pinned else "one core, not pinned"
    return _report(plan, options, results) | {
        "cores": len(cores),
        "pinned": list(pinned) if pinned else None,
        "bare": bare,
        "where": f"two processes, {where}",
    }


def _measure_between(plan: measure.Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Measure against an ``ivsmc bench --listen``."""
    with between.connected(options.connect, options.device, options.require) as (session, plain):
        legs = [
            _Leg("ivsmc", "ivsmc spinning", Far(session, session, _SPIN_US), "spinning"),
            _Leg("ivsmc", "ivsmc sleeping", Far(session, session, 0), "sleeping"),
            _Leg("tcp", "TCP", Far(session, plain, None), None),
        ]
        for leg in legs:
            _progress(f"{leg.label}: checking data")
            leg.checked = measure.check(leg.other, plan)
        for number in range(1, options.rounds + 1):
            for leg in legs:
                leg.measure_round(plan, f"round {number} of {options.rounds}")
        _progress("")
        results = [leg.result() for leg in legs]
        where = f"this process and one at {shown(plain.getpeername())}, not pinned"
    return _report(plan, options, results) | {
        "cores": len(os.sched_getaffinity(0)),
        "pinned": None,
        "bare": None,
        "where": where,
    }


def _report(
    plan: measure.Plan, options: argparse.Namespace, results: list[dict[str, Any]]
) -> dict[str, Any]:
    _add_ratios(results)
    return {
        "version": importlib.metadata.version("ivsmc"),
        "message_bytes": plan.message,
        "round_trips": plan.round_trips * options.rounds,
        "block_bytes": plan.block,
        "stream_bytes": plan.stream_bytes * options.rounds,
        "results": results,
    }


def _add_ratios(results: list[dict[str, Any]]) -> None:
    """Say how many times better than TCP each is; None where TCP was not measured."""
    tcp = next((result for result in results if result["name"] == "tcp"), None)
    for result in results:
        latency = speed = None
        if tcp:
            latency = tcp["round_trip_p50_us"] / result["round_trip_p50_us"]
            speed = result["bytes_per_second"] / tcp["bytes_per_second"]
        result["round_trip_times_tcp"] = latency
        result["throughput_times_tcp"] = speed


def table(report: dict[str, Any]) -> str:
    """Return a report as people read it."""

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} x"

    width = max(18, *(len(result["label"]) for result in report["results"]))
    lines = [
        f"{'':{width}}  {'round trip, 64 B':^30}  {'stream, 64 KiB blocks':>21}",
        f"{'':{width}}  {'p50 us':>9} {'p99 us':>9} {'to TCP':>10}  {'GB/s':>9} {'to TCP':>10}",
    ]
    notes = []
    for result in report["results"]:
        lines.append(
            f"{result['label']:{width}}  {result['round_trip_p50_us']:9.2f} "
            f"{result['round_trip_p99_us']:9.2f} "
            f"{ratio(result['round_trip_times_tcp']):>10}  "
            f"{result['bytes_per_second'] / 1e9:9.2f} "
            f"{ratio(result['throughput_times_tcp']):>10}"
        )
        reason = f"ivsmc went over TCP: {result['fallback_reason']}"
        if result["fallback_reason"] and reason not in notes:
            notes.append(reason)
    if bare := report["bare"]:
        lines.append(
            f"{'limit here, bare':{width}}  {bare['round_trip_us']:9.2f} {'-':>9} {'':>10}  "
            f"{bare['bytes_per_second'] / 1e9:9.2f}"
        )
        notes.append(
            "limit here, bare: two threads that spin, a word there and back, one ring, no protocol"
        )
    checked = min(result["checked_bytes"] for result in report["results"])
    notes.append(
        f"{report['where']}; {report['round_trips']} round trips and "
        f"{report['stream_bytes'] >> 20} MiB each, {checked >> 20} MiB more compared by CRC-32"
    )
    return "\n".join([*lines, "", *notes])


def _progress(text: str) -> None:
    """Show what runs now, on a terminal; empty text clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
