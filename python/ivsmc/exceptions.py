"""What ivsmc raises besides the built-in exceptions of sockets.

Timeouts, resets, broken pipes and would-block are the built-in exceptions, as on a socket. What
sockets do not know is below; all of it is an ``OSError``, so ``except OSError`` still catches
everything that goes wrong with a connection::

    OSError
     +-- Error                        everything that only ivsmc raises
          +-- DeviceError             a device cannot be used; names the spec, the reason, the cure
          |    +-- RegionError        what is behind it is no region, or none of this version
          +-- SMCRequired             require="smc", but shared memory cannot be used  (1)
          +-- PeerMisbehaved          the peer broke the protocol; the session is poisoned  (1)
          +-- ForkedSession           a session that was opened before fork() belongs to the parent

    (1) also a ConnectionError
"""

__all__ = [
    "DeviceError",
    "Error",
    "ForkedSession",
    "PeerMisbehaved",
    "RegionError",
    "SMCRequired",
]


class Error(OSError):
    """Base of everything that only ivsmc raises."""


class DeviceError(Error):
    """A device cannot be used. The message names its spec, the reason and what mends it."""


class RegionError(DeviceError):
    """What is behind a device is not a region, or not one of this version."""


class SMCRequired(Error, ConnectionError):
    """``require="smc"`` was given and the session would have gone over TCP; says why."""


class PeerMisbehaved(Error, ConnectionError):
    """The peer broke the protocol. The session is poisoned: every later call raises this too."""


class ForkedSession(Error):
    """The session was opened before ``fork()`` and belongs to the parent process.

    Connect or accept in the child instead; inherited listeners work there.
    """
