"""``ivsmc server``: the ivshmem server that VMs and host processes share a region through."""

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

import ivsmc
from ivsmc._cli.arguments import Commands, bounded, size

_DEFAULT_SOCKET = "/run/ivsmc/ivs0.sock"
_POLL_SECONDS = 60.0
"""Signals end a poll at once; this bounds one whose signal came just before it."""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "server",
        help="run an ivshmem server",
        description="Run an ivshmem server (QEMU's protocol). Host processes and containers use "
        "it as device host:PATH, VMs as -chardev socket,path=PATH,id=ivs -device "
        "ivshmem-doorbell,chardev=ivs. Who may open the socket may read and write the region.",
    )
    parser.add_argument(
        "path", nargs="?", default=_DEFAULT_SOCKET, help="the Unix socket (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=size, default=size("256M"), help="region in bytes, K, M or G (default: 256M)"
    )
    parser.add_argument(
        "--vectors", type=bounded(1, 255), default=1, help="interrupts per peer (default: 1)"
    )
    parser.add_argument(
        "--file", help="file that holds the region (default: anonymous sealed memory)"
    )
    parser.add_argument(
        "--mode",
        type=lambda text: int(text, 8),
        default=0o600,
        help="permissions of the socket, octal (default: 600)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    signal.signal(signal.SIGTERM, _stop)
    Path(options.path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    server = ivsmc.Server(
        options.path,
        size=options.size,
        vectors=options.vectors,
        file=options.file,
        mode=options.mode,
    )
    try:
        print(
            f"ivsmc server: listening on {options.path}, region of {options.size} bytes, "
            f"{options.vectors} vectors a peer",
            file=sys.stderr,
            flush=True,
        )
        while True:
            server.serve(_POLL_SECONDS, _log)
    except KeyboardInterrupt:
        return 0
    finally:
        server.close()


def _log(event: str) -> None:
    print(f"ivsmc server: {event}", file=sys.stderr, flush=True)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
