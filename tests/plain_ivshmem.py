"""An ivshmem server that does no more than QEMU's: it marks nobody, and sends own vectors last."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path


class PlainServer:
    """Ids, the region and eventfds for whoever connects to ``path``."""

    def __init__(self, path: Path, size: int, vectors: int) -> None:
        self._vectors = vectors
        self._region = os.memfd_create("plain-ivshmem")
        os.ftruncate(self._region, size)
        os.posix_fallocate(self._region, 0, size)
        self._clients: dict[int, tuple[socket.socket, list[int]]] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        for peer in range(65536):
            try:
                client, _ = self._listener.accept()
            except OSError:  # it was shut down
                return
            with self._lock:
                self._welcome(peer, client)
            serving = threading.Thread(target=self._watch, args=(peer, client))
            serving.start()
            self._threads.append(serving)

    def _welcome(self, peer: int, client: socket.socket) -> None:
        own = [os.eventfd(0) for _ in range(self._vectors)]
        _say(client, 0)
        _say(client, peer)
        _say(client, -1, self._region)
        for other, (conn, eventfds) in self._clients.items():
            for eventfd in own:
                _say(conn, peer, eventfd)
            for eventfd in eventfds:
                _say(client, other, eventfd)
        for eventfd in own:
            _say(client, peer, eventfd)
        self._clients[peer] = (client, own)

    def _watch(self, peer: int, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.recv(1)
        with self._lock:
            for eventfd in self._clients.pop(peer)[1]:
                os.close(eventfd)
            client.close()
            for other, _ in self._clients.values():
                with contextlib.suppress(OSError):  # it is about to go, too
                    _say(other, peer)

    def close(self) -> None:
        """End every connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self._path.unlink()
        with self._lock:
            for client, _ in self._clients.values():
                client.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        os.close(self._region)


def _say(client: socket.socket, number: int, descriptor: int | None = None) -> None:
    descriptors = [] if descriptor is None else [descriptor]
    socket.send_fds(client, [struct.pack("<q", number)], descriptors)


@contextlib.contextmanager
def plain_server(path: Path, size: int, vectors: int) -> Iterator[str]:
    """Run one; yield the device spec of its clients."""
    server = PlainServer(path, size, vectors)
    try:
        yield f"host:{path}"
    finally:
        server.close()
