"""``ivsmc doctor``: what is here, what is wrong, and the command that mends it."""

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path

import ivsmc
from ivsmc._cli import between, measure
from ivsmc._cli.arguments import Commands, address, shown
from ivsmc._cli.checks import CHECKS, Finding, Scene, Verdict
from ivsmc._cli.checks.finding import ok, wrong
from ivsmc._cli.machine import Machine

_CONNECT_SECONDS = 5.0
_GREETING_SECONDS = 1.0
"""So long a listener may take to say that it is a bench; others say nothing of the kind."""
_PLAN = measure.Plan(
    message=64, round_trips=500, block=65536, stream_bytes=1 << 20, checked_bytes=1 << 20
)


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="say what is wrong here, and what mends it",
        description="Check this machine, as a host of VMs and as a VM, and send data over each "
        "device. Each line says what was found and, where something is wrong, the command that "
        "mends it. The status is 0 if nothing that was asked for is wrong, else 1; without "
        "--host and --guest the lack of a VM's device or of QEMU is only noted.",
    )
    parser.add_argument("--host", action="store_true", help="this is to run VMs with a region")
    parser.add_argument(
        "--guest", action="store_true", help="this is to be a VM with a region and doorbells"
    )
    parser.add_argument(
        "--socket", action="append", default=[], metavar="PATH", help="an ivshmem server to ask"
    )
    parser.add_argument(
        "--device", metavar="SPEC", help="devices to check instead of those found, as IVSMC_DEVICE"
    )
    parser.add_argument(
        "--to",
        type=address,
        metavar="HOST:PORT",
        help="connect to an ivsmc listener, and say which transport that takes and why; where it "
        "is ivsmc bench --listen, time round trips too",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the checks find; 0 if nothing is wrong, else 1."""
    if options.device is not None:
        os.environ["IVSMC_DEVICE"] = options.device
    found: list[tuple[str, Finding]] = []
    for name, finding in _findings(options):
        found.append((name, finding))
        if not options.json:
            _show(name, finding)
    wrong_ones = sum(finding.verdict is Verdict.WRONG for _, finding in found)
    if options.json:
        report = {
            "ok": not wrong_ones,
            "findings": [
                {
                    "check": name,
                    "verdict": finding.verdict.value,
                    "text": finding.text,
                    "cure": finding.cure,
                }
                for name, finding in found
            ],
        }
        print(json.dumps(report, indent=2))
    else:
        print(f"\n{wrong_ones} wrong" if wrong_ones else "\nnothing wrong")
    return 1 if wrong_ones else 0


def _findings(options: argparse.Namespace) -> Iterator[tuple[str, Finding]]:
    devices, problem = [], None
    try:
        devices = ivsmc.devices()
    except OSError as error:  # what IVSMC_DEVICE names is no device
        problem = wrong(str(error), "unset IVSMC_DEVICE, or give devices as README.md has them")
    scene = Scene(
        machine=Machine(),
        environment=os.environ,
        devices=devices,
        sockets=tuple(str(Path(path).absolute()) for path in options.socket),
        host=options.host,
        guest=options.guest,
    )
    for name, check in CHECKS.items():
        if problem is not None and name == "devices":
            yield name, problem
        else:
            for finding in check(scene):
                yield name, finding
    for device in devices:
        if device["usable"]:
            yield "round trip", _round_trip(device)
    if options.to is not None:
        yield "to", _connect(options.to)


def _round_trip(device: dict[str, object]) -> Finding:
    """Send data over one device, to another process of this machine where it can have two."""
    spec = str(device["spec"])
    try:
        if device["kind"] == "vfio":  # one process at a time
            return _within(spec)
        with contextlib.closing(measure.Peer("ivsmc", None, spec, None)) as peer:
            checked = measure.check(peer, _PLAN)
            trip = statistics.median(measure.round_trips(peer, _PLAN)) / 1000
            session = peer.stream
            assert isinstance(session, ivsmc.Session)
            if session.transport != "smc":
                return wrong(f"{spec}: over TCP: {session.fallback_reason}", None)
    except OSError as error:
        return wrong(f"{spec}: {error}", None)
    return ok(f"{spec}: {checked >> 20} MiB came as sent, round trip {trip:.1f} us")


def _within(spec: str) -> Finding:
    """Send data over a device from this process to itself."""
    data = random.Random(0).randbytes(_PLAN.checked_bytes)
    with ivsmc.create_server(("127.0.0.1", 0), device=spec) as listener:
        near = ivsmc.create_connection(listener.getsockname(), _CONNECT_SECONDS, device=spec)
        far, _ = listener.accept()
    with near, far:
        if near.transport != "smc":
            return wrong(f"{spec}: over TCP: {near.fallback_reason}", None)
        sender = threading.Thread(target=near.sendall, args=(data,))
        sender.start()
        received = far.recv(len(data), socket.MSG_WAITALL)
        sender.join()
    if received != data:
        return wrong(f"{spec}: what came is not what was sent", None)
    return ok(f"{spec}: {len(data) >> 20} MiB came as sent, from this process to itself")


def _connect(target: tuple[str, int]) -> Finding:
    """Connect to a listener that is there already; send data only to one that asks for it."""
    name = shown(target)
    try:
        session = ivsmc.create_connection(target, _CONNECT_SECONDS)
    except OSError as error:
        cure = f"start a listener there: ivsmc bench --listen {target[1]}"
        return wrong(f"{name}: {error.strerror or error}", cure)
    with session:
        if session.transport != "smc":
            return wrong(f"{name}: over TCP: {session.fallback_reason}", None)
        text = f"{name}: over shared memory, device {session.stats()['device']}"
        session.settimeout(_GREETING_SECONDS)
        if not between.greeted(session):
            return ok(text)
        session.settimeout(_CONNECT_SECONDS)
        try:
            far = between.Far(session, session, None)
            checked = measure.check(far, _PLAN)
            trip = statistics.median(measure.round_trips(far, _PLAN)) / 1000
        except OSError as error:
            return wrong(f"{text}, but: {error}", None)
        return ok(f"{text}; {checked >> 20} MiB came as sent, round trip {trip:.1f} us")


def _show(name: str, finding: Finding) -> None:
    word = finding.verdict.value
    print(
        f"{word.upper() if finding.verdict is Verdict.WRONG else word:5}  {name:10}  {finding.text}"
    )
    if finding.cure is not None:
        print(f"{'':19}mend: {finding.cure}", flush=True)
