"""``ivsmc server``: the ivshmem server that VMs and host processes share a region through."""

import argparse
import contextlib
import sys
from pathlib import Path

import ivsmc
from ivsmc._cli import groups, sockets
from ivsmc._cli.arguments import Commands, bounded, permissions, size
from ivsmc._cli.serving import serve, stop_on_sigterm

_DEFAULT_SIZE = 256 << 20


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "server",
        help="run an ivshmem server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Run an ivshmem server (QEMU's protocol) until SIGINT or SIGTERM. Host processes
and containers use it as the device host:PATH; the options for VMs are printed by

  ivsmc qemu-args --socket PATH     (for libvirt: ivsmc xml --socket PATH)

Who may open the socket may read and write the region.""",
    )
    parser.add_argument(
        "path", nargs="?", default=sockets.SERVER, help="the Unix socket (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=size,
        help="region in bytes, K, M or G (default: that of FILE where there is one, else 256M)",
    )
    parser.add_argument(
        "--vectors",
        type=bounded(1, 255),
        default=1,
        metavar="N",
        help="interrupts per peer (default: 1)",
    )
    parser.add_argument(
        "--file", help="file that holds the region (default: anonymous sealed memory)"
    )
    parser.add_argument(
        "--mode",
        type=permissions,
        help="permissions of the socket, octal (default: 600, with --group 660)",
    )
    parser.add_argument(
        "--group",
        type=groups.argument,
        metavar="GROUP",
        help="group of the socket, by name or number",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    stop_on_sigterm()
    Path(options.path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    mode = options.mode
    if mode is None:
        mode = 0o600 if options.group is None else 0o660
    server = ivsmc.Server(
        options.path,
        size=_size(options),
        vectors=options.vectors,
        file=options.file,
        mode=mode,
        group=options.group,
    )
    with server, contextlib.suppress(KeyboardInterrupt):
        _log(
            f"listening on {options.path}, region of {server.status()['size']} bytes, "
            f"{options.vectors} vector{'s' if options.vectors > 1 else ''} a peer"
        )
        serve(server, _log)
    return 0


def _size(options: argparse.Namespace) -> int:
    if options.size is not None:
        return int(options.size)
    file = Path(options.file) if options.file else None
    return (file.stat().st_size if file and file.is_file() else 0) or _DEFAULT_SIZE


def _log(event: str) -> None:
    print(f"ivsmc server: {event}", file=sys.stderr, flush=True)
