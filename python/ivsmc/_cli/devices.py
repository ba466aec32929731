"""``ivsmc devices``: what this process could use, and why not."""

import argparse
import json

import ivsmc
from ivsmc._cli import sockets
from ivsmc._cli.arguments import Commands


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "devices",
        help="list the devices found and what they are worth",
        description="List the devices that IVSMC_DEVICE names, else those found: ivshmem devices "
        f"of this guest, every {sockets.DIRECTORY}/*.sock, and local. The status is 0 if one of "
        "them is usable, else 1.",
    )
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
        if not rows:
            print('no devices: shared memory is switched off (IVSMC_DEVICE is "none")')
            return 1
        width = max(len("DEVICE"), *(len(spec) for spec, _, _ in rows))
        print(f"{'DEVICE':{width}}  USABLE")
        for spec, usable, detail in rows:
            print(f"{spec:{width}}  {usable:6}  {detail}")
    return 0 if any(device["usable"] for device in found) else 1


def _detail(device: dict[str, object]) -> str:
    if not device["usable"]:
        return str(device["reason"]).removeprefix(f"device {device['spec']}: ")
    known = {key: device.get(key) for key in ("size", "region", "slot", "peers", "memory")}
    return ", ".join(f"{key} {value}" for key, value in known.items() if value is not None)
