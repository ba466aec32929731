"""``ivsmc bench``: ivsmc against TCP loopback and an AF_UNIX stream, in one run, as one table."""

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
from ivsmc._cli import measure
from ivsmc._cli.arguments import Commands, add_transport_options, bounded, size

_LABELS = {"ivsmc": "ivsmc", "tcp": "TCP loopback", "unix": "AF_UNIX stream"}


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="measure ivsmc against TCP loopback and AF_UNIX",
        description="Measure round trips of 64 bytes and a stream of 64 KiB blocks between two "
        "processes, each pinned to a core of its own where there are two, over every transport "
        "in the same run. The rounds of the transports alternate; percentiles are over all "
        "rounds, throughput is the median round. All data is checked.",
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
        help="which to measure (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_transport_options(parser)
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Measure and print."""
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
    report = _measure(transports, plan, options)
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 0


def _measure(
    transports: list[str], plan: measure.Plan, options: argparse.Namespace
) -> dict[str, Any]:
    pinned = measure.cores()
    before = os.sched_getaffinity(0)
    trips: dict[str, list[int]] = {name: [] for name in transports}
    speeds: dict[str, list[float]] = {name: [] for name in transports}
    checked: dict[str, int] = {}
    limits: list[tuple[float, float]] = []
    with contextlib.ExitStack() as cleanup:
        if pinned:
            os.sched_setaffinity(0, {pinned[0]})
            cleanup.callback(os.sched_setaffinity, 0, before)
        peers: dict[str, measure.Peer] = {}
        for name in transports:
            _progress(f"{_LABELS[name]}: checking data")
            core = pinned[1] if pinned else None
            peers[name] = measure.Peer(name, core, options.device, options.require)
            cleanup.callback(peers[name].close)
            checked[name] = measure.check(peers[name], plan)
        for number in range(1, options.rounds + 1):
            for name, peer in peers.items():
                _progress(f"round {number} of {options.rounds}: {_LABELS[name]}, round trips")
                trips[name].extend(measure.round_trips(peer, plan))
                _progress(f"round {number} of {options.rounds}: {_LABELS[name]}, stream")
                speeds[name].append(measure.throughput(peer, plan))
            if pinned:
                _progress(f"round {number} of {options.rounds}: the machine's limit")
                limits.append(_native.bare_limit(pinned, plan.round_trips, plan.stream_bytes))
        _progress("")
        results = [
            _result(name, peers[name], sorted(trips[name]), speeds[name], checked[name])
            for name in transports
        ]
    bare = None
    if limits:
        trip, speed = (statistics.median(figures) for figures in zip(*limits, strict=True))
        bare = {"round_trip_us": trip, "bytes_per_second": speed}
    _add_ratios(results)
    return {
        "version": importlib.metadata.version("ivsmc"),
        "cores": len(before),
        "pinned": list(pinned) if pinned else None,
        "message_bytes": plan.message,
        "round_trips": plan.round_trips * options.rounds,
        "block_bytes": plan.block,
        "stream_bytes": plan.stream_bytes * options.rounds,
        "bare": bare,
        "results": results,
    }


def _result(
    name: str, peer: measure.Peer, samples: list[int], speeds: list[float], checked: int
) -> dict[str, Any]:
    session = peer.stream if isinstance(peer.stream, ivsmc.Session) else None
    return {
        "name": name,
        "transport": session.transport if session else name,
        "fallback_reason": str(session.fallback_reason)
        if session and session.fallback_reason
        else None,
        "round_trip_p50_us": samples[len(samples) // 2] / 1000,
        "round_trip_p99_us": samples[len(samples) * 99 // 100] / 1000,
        "bytes_per_second": statistics.median(speeds),
        "checked_bytes": checked,
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


def _table(report: dict[str, Any]) -> str:
    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} x"

    lines = [
        f"{'':18}  {'round trip, 64 B':^30}  {'stream, 64 KiB blocks':>21}",
        f"{'':18}  {'p50 us':>9} {'p99 us':>9} {'to TCP':>10}  {'GB/s':>9} {'to TCP':>10}",
    ]
    notes = []
    for result in report["results"]:
        label = _LABELS[result["name"]]
        if result["name"] == "ivsmc":
            label += f" ({result['transport']})"
        lines.append(
            f"{label:18}  {result['round_trip_p50_us']:9.2f} {result['round_trip_p99_us']:9.2f} "
            f"{ratio(result['round_trip_times_tcp']):>10}  "
            f"{result['bytes_per_second'] / 1e9:9.2f} "
            f"{ratio(result['throughput_times_tcp']):>10}"
        )
        if result["fallback_reason"]:
            notes.append(f"ivsmc went over TCP: {result['fallback_reason']}")
    if bare := report["bare"]:
        lines.append(
            f"{'limit here, bare':18}  {bare['round_trip_us']:9.2f} {'-':>9} {'':>10}  "
            f"{bare['bytes_per_second'] / 1e9:9.2f}"
        )
        notes.append(
            "limit here, bare: two threads that spin, a word there and back, one ring, no protocol"
        )
    pinned = report["pinned"]
    where = f"pinned to cores {pinned[0]} and {pinned[1]}" if pinned else "one core, not pinned"
    checked = min(result["checked_bytes"] for result in report["results"])
    notes.append(
        f"two processes, {where}; {report['round_trips']} round trips and "
        f"{report['stream_bytes'] >> 20} MiB each, {checked >> 20} MiB more compared by CRC-32"
    )
    return "\n".join([*lines, "", *notes])


def _progress(text: str) -> None:
    """Show what runs now, on a terminal; empty text clears the line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
