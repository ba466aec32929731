"""Groups of users, by name or number as ``chgrp`` takes them."""

import argparse
import grp
import shlex

from ivsmc._cli.machine import Refused

__all__ = ["argument", "gid"]

_LARGEST = (1 << 32) - 2
"""The number after it means "leave the group as it is" to ``chown``."""


def gid(text: str) -> int:
    """Return the number of a group. Raises ``Refused`` if there is none of that name."""
    try:
        return grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):  # a NUL in it
        pass
    if not (text.isascii() and text.isdecimal()):
        raise Refused(f"there is no group {text!r}; make it: groupadd --system {shlex.quote(text)}")
    if int(text) > _LARGEST:
        raise Refused(f"{text} is no number of a group: the largest is {_LARGEST}")
    return int(text)


def argument(text: str) -> int:
    """Return the number of a group, as the type of a command line argument."""
    try:
        return gid(text)
    except Refused as error:
        raise argparse.ArgumentTypeError(str(error)) from None
