"""Timeouts as the socket module takes them."""

import math

__all__ = ["checked_timeout"]


def checked_timeout(value: float | None) -> float | None:
    """Return ``value`` in seconds (None: for ever), or raise as ``socket.settimeout`` does."""
    if value is None:
        return None
    if math.isnan(value):  # refuses text, which float() would read
        raise ValueError("Invalid value NaN (not a number)")
    seconds = float(value)
    if seconds < 0:
        raise ValueError("Timeout value out of range")
    return seconds
