"""The main thing: what is sent arrives, bit for bit, on every device."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import ivsmc
import peers
from endpoints import session_pair
from processes import running
from random_stream import exchange


def test_streams_in_both_directions_at_once(device: str, pytestconfig: pytest.Config) -> None:
    total = pytestconfig.getoption("--stream-bytes")
    with running(peers.exchange_with_client, device, 1, 2, total) as server:
        address = server.receive()
        with ivsmc.create_connection(address, device=device) as session:
            expected = "tcp" if device == "none" else "smc"
            assert session.transport == expected, session.fallback_reason
            exchange(session, 2, 1, total)
        assert server.receive() == expected


@pytest.mark.parametrize("buffer", [1, 16 * 1024, 100_000, 1024 * 1024])
def test_streams_through_every_buffer_size(device: str, buffer: int) -> None:
    total = 4 * 1024 * 1024
    near, far = session_pair(device, buffer=buffer)
    with near, far:
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(exchange, near, 3, 4, total),
                pool.submit(exchange, far, 4, 3, total),
            ]
        for job in jobs:
            job.result()
