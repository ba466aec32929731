"""``ivsmc nc``: standard input to a session, the session to standard output."""

import argparse
import os
import socket
import sys
import threading

import ivsmc
from ivsmc._cli.arguments import Commands, add_transport_options, bounded, host, shown

_BLOCK = 256 * 1024
"""Bytes moved at a time."""


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "nc",
        help="connect standard input and output to a session",
        usage="ivsmc nc [options] HOST PORT | ivsmc nc -l [options] [HOST] PORT",
        description="Send standard input, print what comes back, both at once. The end of "
        "standard input ends one direction only. Ends when both directions have ended; on a "
        "terminal, when the peer's has. Standard error says which transport was used and why.",
    )
    parser.add_argument("-l", "--listen", action="store_true", help="wait for one client")
    parser.add_argument(
        "--timeout",
        type=bounded(0.001, 1e9, float),
        metavar="SECONDS",
        help="give up connecting, or waiting for the client, after this long",
    )
    add_transport_options(parser)
    parser.add_argument("address", nargs="+", metavar="[HOST] PORT", help="a port, after a host")
    parser.set_defaults(run=run, parser=parser)


def run(options: argparse.Namespace) -> int:
    """Move bytes both ways until both directions have ended."""
    with _open(options, *_address(options)) as session:
        _announce(session)
        return _copy_both_ways(session)


def _address(options: argparse.Namespace) -> tuple[str, int]:
    *hosts, port = options.address
    if len(hosts) > 1 or not (hosts or options.listen):
        options.parser.error("HOST PORT is needed (with -l, [HOST] PORT)")
    if not port.isdecimal() or int(port) > 65535:
        options.parser.error(f"not a port: {port!r}")
    try:
        name = host(hosts[0] if hosts else "")
    except argparse.ArgumentTypeError as error:
        options.parser.error(str(error))
    return name, int(port)


def _open(options: argparse.Namespace, host: str, port: int) -> ivsmc.Session:
    if not options.listen:
        session = ivsmc.create_connection(
            (host, port), options.timeout, device=options.device, require=options.require
        )
    else:
        dualstack = not host and socket.has_dualstack_ipv6()
        with ivsmc.create_server(
            (host, port),
            family=socket.AF_INET6 if dualstack or ":" in host else socket.AF_INET,
            dualstack_ipv6=dualstack,
            backlog=1,
            device=options.device,
            require=options.require,
        ) as listener:
            _say(f"listening on {shown(listener.getsockname())}")
            listener.settimeout(options.timeout)
            session, _ = listener.accept()
    session.settimeout(None)
    return session


def _announce(session: ivsmc.Session) -> None:
    reason = session.fallback_reason
    how = "shared memory (smc)" if session.transport == "smc" else f"TCP: {reason}"
    _say(f"connected to {shown(session.getpeername())} over {how}")


def _copy_both_ways(session: ivsmc.Session) -> int:
    failure: list[OSError] = []
    sender = threading.Thread(target=_send_input, args=(session, failure), daemon=True)
    sender.start()
    buffer = memoryview(bytearray(_BLOCK))
    while received := session.recv_into(buffer):
        _write_output(buffer[:received])
    if not os.isatty(0):  # nobody types: there is an end of input to wait for
        sender.join()
    if failure:
        _say(failure[0].strerror or str(failure[0]))
        return 1
    return 0


def _send_input(session: ivsmc.Session, failure: list[OSError]) -> None:
    try:
        while block := os.read(0, _BLOCK):
            session.sendall(block)
        session.shutdown(socket.SHUT_WR)
    except OSError as error:
        failure.append(error)


def _write_output(block: memoryview) -> None:
    while block:
        block = block[os.write(1, block) :]


def _say(text: str) -> None:
    print(f"ivsmc nc: {text}", file=sys.stderr, flush=True)
