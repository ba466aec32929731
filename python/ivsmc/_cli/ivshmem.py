"""A look at an ivshmem server: QEMU's protocol, as far as a client must speak it to be counted.

Every message is 8 bytes, a little-endian signed number, with at most one descriptor (QEMU's
``docs/specs/ivshmem-spec.rst``): the version, the client's id, -1 with the region, then the ids
of peers and at last the client's own, once for each vector.
"""

import contextlib
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ivsmc._cli.machine import Refused

_NUMBER = struct.Struct("<q")
_QUIET_SECONDS = 0.1
"""So long after a vector of our own comes no further one; nothing says which is the last."""


@dataclass(frozen=True)
class Look:
    """What an ivshmem server told a client that joined and left."""

    size: int
    """Bytes of the region."""
    vectors: int
    """Interrupts of each peer."""
    peers: int
    """Clients it has, without this one."""


def admission(path: str) -> str:
    """Return what lets a user join the ivshmem server at ``path``, who may not."""
    return f"chgrp GROUP {path}; chmod 660 {path}; or start it with: ivsmc server --group GROUP"


def look(path: str, timeout: float = 2.0) -> Look:
    """Join the ivshmem server at the Unix socket ``path``, and leave it.

    Raises what ``connect`` raises, ``TimeoutError`` when it says too little within ``timeout``
    seconds, and ``Refused`` when it is no ivshmem server or turns the client away.
    """
    deadline = time.monotonic() + timeout
    with socket.socket(socket.AF_UNIX) as client, contextlib.ExitStack() as cleanup:
        client.settimeout(timeout)
        client.connect(path)
        said = _messages(client, cleanup, deadline)
        version, _ = next(said)
        if version != 0:
            raise Refused(f"it speaks version {version} of the protocol, not 0")
        own, _ = next(said)
        marker, region = next(said)
        if marker != -1 or region is None:
            raise Refused("it does not hand out shared memory: is it an ivshmem server?")
        vectors: Counter[int] = Counter()
        expected = None
        while vectors[own] != expected:
            wait = _QUIET_SECONDS if vectors[own] else deadline - time.monotonic()
            if vectors[own] and not select.select([client], [], [], wait)[0]:
                break
            peer, vector = next(said)
            if vector is not None:
                vectors[peer] += 1
                os.close(vector)
            # All peers have as many: where there is another, no silence is waited for.
            expected = max((n for id_, n in vectors.items() if id_ != own), default=None)
        return Look(os.fstat(region).st_size, vectors.pop(own), len(vectors))


def _messages(
    client: socket.socket, cleanup: contextlib.ExitStack, deadline: float
) -> Iterator[tuple[int, int | None]]:
    """Yield numbers, with their descriptors; that of the region is closed by ``cleanup``."""
    while True:
        data, received = b"", None
        while len(data) < _NUMBER.size:
            client.settimeout(max(deadline - time.monotonic(), 0.001))
            part, fds, _, _ = socket.recv_fds(client, _NUMBER.size - len(data), 1)
            received = fds[0] if fds else received
            if not part:
                raise Refused("it turned the client away; its log says why")
            data += part
        (number,) = _NUMBER.unpack(data)
        if number == -1 and received is not None:
            cleanup.callback(os.close, received)
        yield number, received
