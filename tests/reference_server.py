"""An ivshmem server that behaves as QEMU's own, ``contrib/ivshmem-server``.

It differs from ours in what its clients may notice: ids come from a counter that only rolls on; a
newcomer is announced to the others before it is told of them; of its own vectors it hears last; a
client that has left is announced, but nothing is marked in the region and no doorbell is notified.
"""

import contextlib
import os
import selectors
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from processes import Here, Remote, running

_IDS = 1 << 16
_REGION = -1
_VERSION = 0


class _Client:
    def __init__(self, connection: socket.socket, number: int, vectors: int) -> None:
        self.connection = connection
        self.id = number
        self.eventfds = [os.eventfd(0) for _ in range(vectors)]

    def tell(self, number: int, descriptor: int | None = None) -> None:
        """Send one message; who does not take it is not waited for (its errors are ignored)."""
        descriptors = [] if descriptor is None else [descriptor]
        with contextlib.suppress(OSError):
            socket.send_fds(self.connection, [struct.pack("<q", number)], descriptors)

    def tell_of(self, other: "_Client") -> None:
        for eventfd in other.eventfds:
            self.tell(other.id, eventfd)

    def close(self) -> None:
        self.connection.close()
        for eventfd in self.eventfds:
            os.close(eventfd)


class ReferenceServer:
    """Serves one region of ``size`` bytes on the Unix socket ``path``."""

    def __init__(self, path: str, size: int, vectors: int) -> None:
        self._path = path
        self._vectors = vectors
        self._next_id = 0
        self._clients: dict[int, _Client] = {}
        self._region = os.memfd_create("ivshmem")
        os.ftruncate(self._region, size)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def serve(self, here: Here) -> None:
        """Serve; tell the ids that are there when asked, until told to stop."""
        self._selector.register(here, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.data is not None:
                    key.data()
                elif here.receive() == "ids":
                    here.send(list(self._clients))
                else:
                    return

    def close(self) -> None:
        self._selector.close()
        self._listener.close()
        Path(self._path).unlink()
        for client in self._clients.values():
            client.close()
        os.close(self._region)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        while self._next_id in self._clients:
            self._next_id = (self._next_id + 1) % _IDS
        client = _Client(connection, self._next_id, self._vectors)
        self._next_id = (self._next_id + 1) % _IDS
        client.tell(_VERSION)
        client.tell(client.id)
        client.tell(_REGION, self._region)
        others = list(self._clients.values())
        for other in others:
            other.tell_of(client)
        for other in others:
            client.tell_of(other)
        client.tell_of(client)
        self._clients[client.id] = client
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._left(client))

    def _left(self, client: _Client) -> None:
        self._selector.unregister(client.connection)
        del self._clients[client.id]
        client.close()
        for other in self._clients.values():
            other.tell(client.id)


@contextlib.contextmanager
def running_reference(path: Path, size: int, vectors: int) -> Iterator[tuple[Remote, str]]:
    """One in a process of its own, and the device that it makes."""
    with running(serve, str(path), size, vectors) as server:
        assert server.receive() == "listens"
        yield server, f"host:{path}"
        server.send("stop")
        assert server.receive() is None


def serve(here: Here, path: str, size: int, vectors: int) -> None:
    """Run one; say when it listens."""
    server = ReferenceServer(path, size, vectors)
    with contextlib.closing(server):
        here.send("listens")
        server.serve(here)
