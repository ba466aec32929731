"""A client of an ivshmem server that only notes what it is told (QEMU's ivshmem-spec)."""

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path


class NotServedError(ConnectionError):
    """The ivshmem server has ended the connection before it said anything."""


class Client:
    """Knows its id, and by which eventfds everybody is notified."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._is_told = False
        self.eventfds: dict[int, list[int]] = {}
        """Of each id, in order, the kernel's numbers of its eventfds."""
        assert self._next() == (0, None), "protocol version"
        self.id, _ = self._next()
        number, region = self._next()
        assert number == -1, "region"
        assert region is not None
        os.close(region)
        while self.id not in self.eventfds or len({len(v) for v in self.eventfds.values()}) > 1:
            self.wait()

    def wait(self) -> None:
        """Take one message more."""
        peer, eventfd = self._next()
        assert eventfd is not None, f"QEMU would die of it if {peer} came back"
        lines = Path(f"/proc/self/fdinfo/{eventfd}").read_text().splitlines()
        [number] = [line.split()[1] for line in lines if line.startswith("eventfd-id:")]
        os.close(eventfd)
        self.eventfds.setdefault(peer, []).append(int(number))

    def take_all(self) -> None:
        """Take what has come, without waiting."""
        while select.select([self._connection], [], [], 0)[0]:
            self.wait()

    def _next(self) -> tuple[int, int | None]:
        """A message's number, and the descriptor that came with it."""
        data, descriptors, _, _ = socket.recv_fds(self._connection, 8, 1)
        if not data and not self._is_told:
            raise NotServedError
        self._is_told = True
        assert len(data) == 8, "the ivshmem server has gone"
        [number] = struct.unpack("<q", data)
        return number, descriptors[0] if descriptors else None


@contextlib.contextmanager
def client(path: Path, patience: float) -> Iterator[Client]:
    """Join the ivshmem server of the socket ``path``; fail after so many seconds of silence."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(patience)
        connection.connect(str(path))
        yield Client(connection)
