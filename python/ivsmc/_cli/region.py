"""``ivsmc region``: what is in a region, and an operator's word that a peer is dead."""

import argparse
import json
from typing import Any

import ivsmc
from ivsmc._cli.arguments import Commands
from ivsmc._cli.machine import Refused


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "region",
        help="show what is in a region",
        description="Attach to a device and show what is in its region: peer slots with who may "
        "say that they are dead, listeners, extents, buffers. With --declare-dead say it "
        "yourself, where nobody else can.",
    )
    parser.add_argument("device", metavar="SPEC", help="the device, such as host:PATH or local")
    parser.add_argument(
        "--declare-dead",
        metavar="SLOT",
        help="give back what the owner of this slot (index.generation, as listed) had. Only for "
        "one that will never run again: it would write into memory that is others' then",
    )
    parser.add_argument("--yes", action="store_true", help="with --declare-dead: it is so")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Print what is there."""
    if options.yes and options.declare_dead is None:
        options.parser.error("--yes belongs to --declare-dead")
    with ivsmc.open_device(options.device) as device:
        declared = None
        if options.declare_dead is not None:
            declared = _declare_dead(device, options.declare_dead, sure=options.yes)
        report = {
            "spec": device.spec,
            "stats": device.stats(),
            "census": device.census(),
            "slots": device.slots(),
            "declared_dead": declared,
        }
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 0


def _declare_dead(device: ivsmc.Device, name: str, *, sure: bool) -> str:
    """Declare a slot dead; return its name. Raises ``Refused`` if it is not ``sure``."""
    slots = {slot["slot"]: slot for slot in device.slots()}
    if name not in slots:
        others = ", ".join(known for known, slot in slots.items() if not slot["own"]) or "none"
        raise Refused(f"no slot {name} is in use (of others: {others})")
    if not sure:
        raise Refused(
            f"slot {name} ({_describe(slots[name])}) would be declared dead, and what it had given "
            "to others. Is its VM or process gone for good? If it runs on, it writes into "
            "memory of other sessions. If you are certain, add --yes"
        )
    device.declare_dead(name)
    return name


def _describe(slot: dict[str, Any]) -> str:
    words = [str(slot["state"]), f"prover {slot['prover']}"]
    if slot["ivposition"] is not None:
        words.append(f"ivposition {slot['ivposition']}")
    if slot["addresses"]:
        words.append(f"host {', '.join(map(str, slot['addresses']))}")
    return ", ".join(words)


def _table(report: dict[str, Any]) -> str:
    stats, census = report["stats"], report["census"]
    lines = [f"slot {report['declared_dead']} is declared dead"] if report["declared_dead"] else []
    lines += [
        f"{report['spec']}: region {stats['region']}, {stats['size'] >> 20} MiB",
        f"slots: {census['live']} live, {census['dead']} dead, of {stats['slots']}; "
        f"{census['listeners']} listeners, {census['intents']} intents",
        f"extents: {census['extents']} of {stats['extents_total']} in use, "
        f"{stats['extent_size'] >> 10} KiB each; buffers: {census['dmbs_held']} held by their "
        f"readers, {census['dmbs_attached']} attached by writers",
        "",
    ]
    head = ("SLOT", "STATE", "PROVER", "IVPOSITION", "VECTOR", "WHERE", "ADDRESSES")
    rows = [head, *(_row(slot) for slot in report["slots"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(slot: dict[str, Any]) -> tuple[str, ...]:
    def number(value: int | None) -> str:
        return "-" if value is None else str(value)

    return (
        str(slot["slot"]),
        str(slot["state"]),
        str(slot["prover"]),
        number(slot["ivposition"]),
        number(slot["vector"]),
        _where(slot),
        ", ".join(map(str, slot["addresses"])),
    )


def _where(slot: dict[str, Any]) -> str:
    """Say where its owner runs, as seen from here."""
    if slot["own"]:
        return "this process"
    if slot["same_boot"]:
        return "this machine"
    if slot["same_machine"]:
        return "before a reboot"
    return "elsewhere" if slot["same_boot"] is False else "unknown"
