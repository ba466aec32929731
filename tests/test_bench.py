"""``ivsmc bench`` between two processes started by hand, and who else may connect to it."""

import contextlib
import json
import multiprocessing
import re
import socket
import struct
import threading
from typing import Any

import pytest

import ivsmc
from commands import command, listening
from endpoints import LOOPBACK, receive_all, receive_exactly
from ivsmc._cli import measure

SMALL = ["--round-trips", "200", "--bytes", "2M", "--rounds", "2"]
GREETING = b"ivsmc bench 1\n"


def measured(port: int, device: str, *options: str) -> dict[str, Any]:
    result = command(
        "bench", "--json", "--connect", f"127.0.0.1:{port}", "--device", device, *SMALL, *options
    )
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert isinstance(report, dict)
    return report


def test_between_two_processes(device: str, free_port: int) -> None:
    with listening(free_port, "--device", device) as said:
        report = measured(free_port, device)
    rows = {(row["name"], row["mode"]): row for row in report["results"]}
    spinning, sleeping = rows["ivsmc", "spinning"], rows["ivsmc", "sleeping"]
    tcp = rows["tcp", None]
    for row in rows.values():
        assert row["checked_bytes"] == 2 << 20
        assert 0 < row["round_trip_p50_us"] <= row["round_trip_p99_us"]
        assert row["bytes_per_second"] > 0
    assert tcp["round_trip_times_tcp"] == tcp["throughput_times_tcp"] == 1.0
    assert (report["round_trips"], report["stream_bytes"]) == (400, 4 << 20)
    if device == "none":
        assert spinning["transport"] == sleeping["transport"] == "tcp"
        assert spinning["fallback_reason"].startswith("DISABLED")
        assert "over DISABLED" in said[1]
    else:
        assert spinning["transport"] == sleeping["transport"] == "smc"
        assert spinning["device"] == device
        assert "over shared memory" in said[1]
        # Who spins for longer than most answers take sleeps less.
        assert sleeping["counters"]["sleeps"] > spinning["counters"]["sleeps"]


def test_as_a_table_and_one_after_the_other(free_port: int) -> None:
    with listening(free_port) as said:
        for _ in range(2):
            result = command("bench", "--connect", f"127.0.0.1:{free_port}", *SMALL)
            assert (result.returncode, result.stderr) == (0, "")
            for label in ("ivsmc spinning (smc)", "ivsmc sleeping (smc)", "TCP"):
                row = rf"^{re.escape(label)} +[\d.]+ +[\d.]+ +[\d.]+ x +[\d.]+ +[\d.]+ x$"
                assert re.search(row, result.stdout, re.M), result.stdout
    assert sum(line.endswith("has gone\n") for line in said) == 2


def test_it_does_not_fall_back_silently(free_port: int) -> None:
    with listening(free_port):
        result = command(
            "bench", "--connect", f"127.0.0.1:{free_port}", "--device", "none", "--require", "smc"
        )
    assert result.returncode == 1
    assert "DISABLED" in result.stderr


def test_nobody_listens(free_port: int) -> None:
    result = command("bench", "--connect", f"127.0.0.1:{free_port}")
    assert result.returncode == 1
    assert f"start there: ivsmc bench --listen {free_port}" in result.stderr


def test_something_else_listens() -> None:
    def greet() -> None:
        client, _ = listener.accept()
        with client:
            client.sendall(b"220 mail.example.org ESMTP\r\n")
            with contextlib.suppress(ConnectionResetError):  # by what it had not read
                assert client.recv(1) == b"", "it is told nothing"

    with socket.create_server(LOOPBACK) as listener:
        mail = threading.Thread(target=greet)
        mail.start()
        result = command("bench", "--connect", f"127.0.0.1:{listener.getsockname()[1]}")
        mail.join()
    assert result.returncode == 1
    assert "is no ivsmc bench --listen" in result.stderr


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
        struct.pack("<BBIQQ", 9, 0, 0, 0, 0),
        struct.pack("<BBIQQ", 1, 1, 0, 1, 64),
        struct.pack("<BBIQQ", 1, 0, 0, 1 << 63, 1 << 62),
        struct.pack("<BBIQQ", 2, 0, 0, 1, 1),
        b"half",
        b"",
    ],
    ids=[
        "http",
        "unknown command",
        "no such stream",
        "too much",
        "too small",
        "half a command",
        "nothing",
    ],
)
def test_a_client_that_talks_nonsense(free_port: int, sent: bytes) -> None:
    """It is shown the door, and the next one is served."""
    with listening(free_port) as said:
        with socket.create_connection(("127.0.0.1", free_port)) as client:
            assert receive_exactly(client, len(GREETING)) == GREETING
            client.sendall(sent)
            with contextlib.suppress(OSError):  # a reset, by what it had not read
                client.shutdown(socket.SHUT_WR)
                assert receive_all(client) == b""
        with ivsmc.create_connection(("127.0.0.1", free_port)) as session:
            assert receive_exactly(session, len(GREETING)) == GREETING
    assert sum("is here" in line for line in said) == 2, said


def test_a_stranger_between_the_two_connections(free_port: int) -> None:
    """Only the connection with the token is the plain one."""
    token = bytes(range(16))
    with listening(free_port), ivsmc.create_connection(("127.0.0.1", free_port)) as session:
        assert receive_exactly(session, len(GREETING)) == GREETING
        session.sendall(struct.pack("<BBI", 0, 0, 0) + token)
        with socket.create_connection(("127.0.0.1", free_port)) as stranger:
            stranger.sendall(bytes(16))
            assert stranger.recv(1) == b""
        with socket.create_connection(("127.0.0.1", free_port)) as plain:
            plain.sendall(token)
            assert receive_exactly(session, 8) == bytes(8)
            session.sendall(struct.pack("<BBIQQ", 1, 1, 0, 1, 5))
            plain.sendall(b"hello")
            assert receive_exactly(plain, 5) == b"hello"
            assert receive_exactly(session, 8) == struct.pack("<Q", 1)


def test_a_listener_that_miscounts(free_port: int) -> None:
    """What did not come as sent is said in one line."""

    def miscount() -> None:
        near, _ = listener.accept()
        with near:
            near.sendall(GREETING)
            token = receive_exactly(near, 22)[6:]
            plain, _ = listener.accept()
            with plain:
                assert receive_exactly(plain, 16) == token
                near.sendall(bytes(8))
                (total, _) = struct.unpack("<QQ", receive_exactly(near, 22)[6:])
                receive_exactly(near, total)
                near.sendall(struct.pack("<Q", 1 << 32))

    with socket.create_server(("127.0.0.1", free_port)) as listener:
        other = threading.Thread(target=miscount)
        other.start()
        result = command("bench", "--connect", f"127.0.0.1:{free_port}", "--device", "none", *SMALL)
        other.join()
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"ivsmc: CRC-32 of {2 << 20} bytes differs at the two ends\n"


def test_the_other_process_is_killed() -> None:
    with contextlib.closing(measure.Peer("unix", None, None, None)) as peer:
        (other,) = multiprocessing.active_children()
        other.kill()
        other.join()
        with pytest.raises(ConnectionError, match=r"has ended \(status -9\)"):
            peer.ask("crc", 0)
        with pytest.raises(ConnectionError, match=r"has ended \(status -9\)"):
            peer.answer()


@pytest.mark.parametrize("text", ["host", "1:2:3", "[::1", "host:70000", "host:"])
def test_what_is_no_address(text: str) -> None:
    result = command("bench", "--connect", text)
    assert result.returncode == 2
    assert "not an address" in result.stderr
