"""The command ``ivsmc``, also ``python -m ivsmc``."""

import argparse
import sys
from collections.abc import Sequence

from ivsmc._cli import bench, devices, nc, server

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="ivsmc",
        description="Stream sessions over ivshmem shared memory, with TCP fallback.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (bench, devices, nc, server):
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"ivsmc: {error.strerror or error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
