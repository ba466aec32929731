"""A signal to this process after so many nanoseconds, by a timer of the kernel.

A process that is signalled by another is hit when that other happens to run; a timer's interrupt
comes at any instruction.
"""

import ctypes
import os
import signal
import time

_LIBC = ctypes.CDLL(None, use_errno=True)
_SIGEV_SIGNAL = 0
_PR_SET_PDEATHSIG = 1


class _SigEvent(ctypes.Structure):
    """``struct sigevent``, 64 bytes."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * (64 - 8 - ctypes.sizeof(ctypes.c_void_p))),
    )


def signal_after(number: signal.Signals, nanoseconds: int) -> None:
    """Have the kernel send this process ``number``, SIGKILL as well."""
    timer = ctypes.c_void_p()
    event = _SigEvent(signo=number, notify=_SIGEV_SIGNAL)
    _check(_LIBC.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)))
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    # struct itimerspec: no interval, then the time.
    spec = (ctypes.c_long * 4)(0, 0, seconds, max(rest, 1))
    _check(_LIBC.timer_settime(timer, 0, spec, None))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends."""
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
