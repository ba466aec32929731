"""The command ``ivsmc``, also ``python -m ivsmc``."""

import argparse
import contextlib
import importlib.metadata
import sys
from collections.abc import Sequence

from ivsmc._cli import agent, bench, bind, devices, doctor, nc, qemu_args, region, server, xml

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ivsmc",
        description="Stream sessions over ivshmem shared memory, with TCP fallback.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("ivsmc"))
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (agent, bench, bind, devices, doctor, nc, qemu_args, region, server, xml):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        if sys.stdout is not None:  # started with it closed
            sys.stdout.flush()  # now, while what goes wrong can still be told in one line
        return status
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"ivsmc: {where}{error.strerror or error}", file=sys.stderr)
        with contextlib.suppress(AttributeError, OSError):
            sys.stdout.close()  # what it did not take is not tried again at exit
        return 1


if __name__ == "__main__":
    sys.exit(main())
