"""``ivsmc agent``: owns a virtual machine's ivshmem device and shares it with its processes."""

import argparse
import contextlib
import sys
from pathlib import Path

import ivsmc
from ivsmc._cli import groups, sockets
from ivsmc._cli.arguments import Commands, permissions
from ivsmc._cli.serving import serve, stop_on_sigterm


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "agent",
        help="share a VM's ivshmem device among its processes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Own an ivshmem device of this virtual machine, which one process alone can open,
and let the machine's processes use it, until SIGINT or SIGTERM. They find the
agent by themselves at the default socket, else by the device agent:PATH. The
device must be bound to vfio-pci (ivsmc bind).

Who may open the socket may read and write the region. Processes keep the device
when the agent ends; the next one can start when the last of them has ended.""",
    )
    parser.add_argument(
        "address",
        nargs="?",
        metavar="ADDRESS",
        help="the device's PCI address (default: the only one that is bound to vfio-pci)",
    )
    parser.add_argument(
        "--socket",
        metavar="PATH",
        help=f"the Unix socket (default: {sockets.AGENT}, with ADDRESS "
        f"{sockets.agent_of('ADDRESS')})",
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
    directory = Path(options.socket or sockets.AGENT).parent
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    mode = options.mode
    if mode is None:
        mode = 0o600 if options.group is None else 0o660
    with ivsmc.Agent(options.address, path=options.socket, mode=mode, group=options.group) as agent:
        with contextlib.suppress(KeyboardInterrupt):
            status = agent.status()
            _log(
                f"{status['device']} is shared at {status['path']}, "
                f"region of {status['size']} bytes, {status['vectors']} vectors"
            )
            serve(agent, _log)
        left = len(agent.status()["clients"])
        if left:
            _log(f"{left} processes keep the device; the next agent can start when they have ended")
    return 0


def _log(event: str) -> None:
    print(f"ivsmc agent: {event}", file=sys.stderr, flush=True)
