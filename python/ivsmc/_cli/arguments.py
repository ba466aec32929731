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


def add_transport_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--require``."""
    parser.add_argument(
        "--device",
        metavar="SPEC",
        help="device to use, or several with commas; none: plain TCP (default: IVSMC_DEVICE, "
        "else what is found)",
    )
    parser.add_argument("--require", choices=["smc"], help="fail instead of falling back to TCP")
