"""Pseudo-random streams that both ends know, in pseudo-random pieces."""

import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from endpoints import Endpoint

LARGEST = 1 << 18
"""Bytes of the largest piece."""
PERIOD = (1 << 21) + 4099
"""Bytes after which the stream repeats; no multiple of any buffer's size."""


class RandomStream:
    """Piece by piece, the stream of ``seed``."""

    def __init__(self, seed: int) -> None:
        self._sizes = random.Random(f"sizes {seed}")
        once = random.Random(seed).randbytes(PERIOD)
        self._data = once + once[:LARGEST]
        self.position = 0

    def piece_size(self, left: int) -> int:
        """A size from 1 to ``LARGEST``, small ones as likely as large ones."""
        return min(int(2 ** self._sizes.uniform(0, LARGEST.bit_length() - 1)), left)

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        start = self.position % PERIOD
        self.position += size
        return self._data[start : start + size]

    def peek(self, size: int) -> bytes:
        start = self.position % PERIOD
        return self._data[start : start + size]


def exchange(stream: Endpoint, send_seed: int, receive_seed: int, total: int) -> None:
    """Send and receive ``total`` bytes at once, each in a thread, and check what arrives."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(_or_close, stream, send_stream, send_seed, total),
            pool.submit(_or_close, stream, receive_stream, receive_seed, total),
        ]
    for job in jobs:
        job.result()


def _or_close(
    stream: Endpoint, action: Callable[[Endpoint, int, int], None], seed: int, total: int
) -> None:
    try:
        action(stream, seed, total)
    except BaseException:
        stream.close()  # so that the other thread and the peer do not wait
        raise


def send_stream(stream: Endpoint, seed: int, total: int) -> None:
    """Send the stream of ``seed`` through every way of sending, then end this direction."""
    data = RandomStream(seed)
    while left := total - data.position:
        piece = data.peek(data.piece_size(left))
        match data.position % 3:
            case 0:
                sent = stream.send(piece)
            case 1:
                stream.sendall(piece)
                sent = len(piece)
            case _:
                middle = len(piece) // 2
                sent = stream.sendmsg([piece[:middle], memoryview(piece)[middle:]])
        data.take(sent)
    stream.shutdown(socket.SHUT_WR)


def receive_stream(stream: Endpoint, seed: int, total: int) -> None:
    """Receive through every way of receiving; check the stream of ``seed`` and its end."""
    data = RandomStream(seed)
    buffer = memoryview(bytearray(LARGEST))
    while left := total - data.position:
        size = data.piece_size(left)
        match data.position % 3:
            case 0:
                received = stream.recv(size)
            case 1:
                received = bytes(buffer[: stream.recv_into(buffer, size)])
            case _:
                middle = size // 2
                count, *_ = stream.recvmsg_into([buffer[:middle], buffer[middle:size]])
                received = bytes(buffer[:count])
        assert received, f"the stream ended at {data.position} of {total} bytes"
        position = data.position
        assert received == data.take(len(received)), f"wrong bytes after {position}"
    assert stream.recv(1) == b""
