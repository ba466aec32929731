"""``ivsmc server``: the ivshmem server that VMs and host processes share a region through."""

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import ivsmc
from ivsmc._cli import groups, sockets
from ivsmc._cli.arguments import Commands, bounded, permissions, size
from ivsmc._cli.keeper import keep
from ivsmc._cli.serving import serve

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

Who may open the socket may read and write the region.

With --state it survives its own end: the next one goes on with the same region
and the same clients, who notice nothing. As a systemd service systemd keeps what
that takes (FileDescriptorStoreMax=); otherwise this process does, and serves in
one of its own, which it starts anew however that ends. SIGHUP starts it anew, too.
""",
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
    parser.add_argument(
        "--state", action="store_true", help="survive its own end, with all clients"
    )
    parser.set_defaults(run=run)


class _Signals:
    """SIGINT and SIGTERM while serving; one of them, and only then.

    At any other time it would be the server's end, or a part of it, that is broken off.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.first: int | None = None
        """The one that came first."""
        self._may_raise = False
        for number in self._NUMBERS:
            signal.signal(number, self._came)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_exception: object) -> None:
        # Python would give them their defaults while it ends.
        for number in self._NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def serve(self, server: ivsmc.Server) -> None:
        """Serve until one comes."""
        with contextlib.suppress(KeyboardInterrupt):
            self._may_raise = True
            if self.first is None:
                serve(server, _log)

    def _came(self, number: int, _frame: FrameType | None) -> None:
        if self.first is None:
            self.first = number
        if self._may_raise:
            self._may_raise = False
            raise KeyboardInterrupt


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    if options.state and "NOTIFY_SOCKET" not in os.environ:
        return keep(_command(options), _log)
    signals = _Signals()
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
        state=options.state,
    )
    if options.state and not {"FDSTORE", "LISTEN_FDS"} & os.environ.keys():
        _log(
            "systemd does not say how much it keeps: its version is below 254, or the unit has no "
            "FileDescriptorStoreMax=, and then a restart is the end for all clients"
        )
    with signals, server:
        is_now = server.status()
        _log(
            f"listening on {is_now['path']}, region of {is_now['size']} bytes, "
            f"{is_now['vectors']} vector{'s' if is_now['vectors'] > 1 else ''} a peer"
        )
        try:
            signals.serve(server)
        finally:
            # However it ends another one goes on; only SIGINT says that none shall.
            server.close(keep=signals.first != signal.SIGINT)
    return 0


def _command(options: argparse.Namespace) -> list[str]:
    """Return the command that serves as ``options`` say, and leaves its state to who started it."""
    command = [sys.executable, "-P", "-m", "ivsmc", "server", "--state"]
    command += ["--vectors", str(options.vectors)]
    command += ["--mode", f"{options.mode:o}"] if options.mode is not None else []
    command += ["--group", str(options.group)] if options.group is not None else []
    command += ["--size", str(options.size)] if options.size is not None else []
    command += ["--file", options.file] if options.file else []
    return [*command, "--", options.path]


def _size(options: argparse.Namespace) -> int:
    if options.size is not None:
        return int(options.size)
    file = Path(options.file) if options.file else None
    return (file.stat().st_size if file and file.is_file() else 0) or _DEFAULT_SIZE


def _log(event: str) -> None:
    # Who reads it may be gone, or its disk full.
    with contextlib.suppress(OSError):
        print(f"ivsmc server: {event}", file=sys.stderr, flush=True)
