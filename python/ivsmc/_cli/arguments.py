"""Types of command line arguments and the options that several commands have."""

import argparse
import re
from typing import Any, Protocol


class Commands(Protocol):
    """What ``ArgumentParser.add_subparsers`` returns."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        """Add the parser of one command."""


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def size(text: str) -> int:
    """Return bytes: a number with K, M or G for 1024, 1024**2 or 1024**3."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (such as 4096, 64K, 256M, 2G)")
    value = int(match[1]) * _UNITS[match[2].upper()]
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any file can hold")
    return value


def bounded(low: float, high: float, kind: type[int] | type[float] = int) -> "type[int]":
    """Return a type that takes numbers from ``low`` to ``high`` only."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not in {low}..{high}")
        return value

    return number  # type: ignore[return-value]


def permissions(text: str) -> int:
    """Return permissions, given in octal."""
    if not re.fullmatch("[0-7]{1,4}", text) or int(text, 8) > 0o777:
        raise argparse.ArgumentTypeError(f"not permissions: {text!r} (octal, such as 660)")
    return int(text, 8)


def host(text: str) -> str:
    """Return the name of a host, if the resolver can be asked for it."""
    try:
        text.encode("idna")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"not a host: {text!r}") from None
    return text


def address(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``, ``[HOST]:PORT``, ``:PORT`` or ``PORT``.

    No host is the empty string: any address to listen on, this machine to connect to.
    """
    match = re.fullmatch(r"(?:(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]*)):)?(?P<port>\d+)", text)
    if match is None or int(match["port"]) > 65535:
        raise argparse.ArgumentTypeError(
            f"not an address: {text!r} (HOST:PORT, [IPV6]:PORT, :PORT or PORT)"
        )
    return host(match["v6"] or match["host"] or ""), int(match["port"])


def shown(address: tuple[object, ...]) -> str:
    """Return a socket's address as people write it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def add_transport_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--require``."""
    parser.add_argument(
        "--device",
        metavar="SPEC",
        help="device to use, or several with commas; none: plain TCP (default: IVSMC_DEVICE, "
        "else what is found)",
    )
    parser.add_argument("--require", choices=["smc"], help="fail instead of falling back to TCP")
