"""Stream sessions over ivshmem shared memory, with TCP fallback.

The shapes are the standard library's::

    import ivsmc

    with ivsmc.create_server(("", 9000)) as listener:        # socket.create_server
        session, address = listener.accept()

    with ivsmc.create_connection(("host", 9000)) as session:  # socket.create_connection
        session.sendall(b"hello")
        print(session.transport, session.fallback_reason)

A session goes through shared memory where both ends are ivsmc and share a region, and over plain
TCP otherwise; ``session.transport`` and ``session.fallback_reason`` say which and why.
"""

from ivsmc._connect import create_connection, create_server
from ivsmc._fallback import FallbackReason
from ivsmc._listener import Listener
from ivsmc._native import Agent, Device, Server, devices, open_device
from ivsmc._session import Session
from ivsmc.exceptions import (
    DeviceError,
    Error,
    ForkedSession,
    PeerMisbehaved,
    RegionError,
    SMCRequired,
)

__all__ = [
    "Agent",
    "Device",
    "DeviceError",
    "Error",
    "FallbackReason",
    "ForkedSession",
    "Listener",
    "PeerMisbehaved",
    "RegionError",
    "SMCRequired",
    "Server",
    "Session",
    "create_connection",
    "create_server",
    "devices",
    "open_device",
]
