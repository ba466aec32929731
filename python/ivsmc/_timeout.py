"""Timeouts as the socket module takes them."""

import math

__all__ = ["checked_timeout"]


def checked_timeout(value: float | None) -> float | None:
    """Return ``value`` in seconds (None: for ever), or raise as ``socket.settimeout`` does."""
    if value is None:
        return None
    if isinstance(value, (str, bytes, bytearray)):  # float() would read them
        raise TypeError(f"must be real number, not {type(value).__name__}")
    seconds = float(value)
    if math.isnan(seconds):
        raise ValueError("Invalid value NaN (not a number)")
    if seconds < 0:
        raise ValueError("Timeout value out of range")
    return seconds
