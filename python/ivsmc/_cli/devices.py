"""``ivsmc devices``: what this process could use, and why not."""

import argparse
import json

import ivsmc
from ivsmc._cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser("devices", help="list the devices found and what they are worth")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table; 0 if a device is usable, else 1."""
    found = ivsmc.devices()
    if options.json:
        print(json.dumps(found, indent=2, default=str))
    else:
        rows = [
            (str(device["spec"]), "yes" if device["usable"] else "no", _detail(device))
            for device in found
        ]
        width = max((len(spec) for spec, _, _ in rows), default=0)
        width = max(width, len("DEVICE"))
        print(f"{'DEVICE':{width}}  USABLE  ")
        for spec, usable, detail in rows:
            print(f"{spec:{width}}  {usable:6}  {detail}")
    return 0 if any(device["usable"] for device in found) else 1


def _detail(device: dict[str, object]) -> str:
    if not device["usable"]:
        return str(device["reason"])
    known = {key: device.get(key) for key in ("size", "region", "slot", "peers")}
    return ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
