"""A client of an ivshmem server that only writes down what it is told (QEMU's ivshmem-spec)."""

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path


class Client:
    """Knows the own id and who else is there, with how many vectors."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.peers: dict[int, int] = {}
        assert self._next() == (0, False), "protocol version"
        self.id, _ = self._next()
        assert self._next() == (-1, True), "region"
        while self.id not in self.peers or len(set(self.peers.values())) > 1:
            self.wait()

    def wait(self) -> None:
        """Take one message more: a vector, or that a peer has left."""
        number, vector = self._next()
        if vector:
            self.peers[number] = self.peers.get(number, 0) + 1
        else:
            del self.peers[number]

    def _next(self) -> tuple[int, bool]:
        """A message's number, and whether a descriptor came with it."""
        data, descriptors, _, _ = socket.recv_fds(self._connection, 8, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        assert len(data) == 8, "the ivshmem server has gone"
        [number] = struct.unpack("<q", data)
        return number, bool(descriptors)


@contextlib.contextmanager
def client(path: Path, patience: float) -> Iterator[Client]:
    """Join the ivshmem server of the socket ``path``; fail after so many seconds of silence."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(patience)
        connection.connect(str(path))
        yield Client(connection)
