"""What goes over the wire is SMC: Wireshark's own dissector says so of a capture of handshakes.

Needs ``dumpcap`` and ``tshark``, and the right to capture; skipped without, but a failure where
``IVSMC_REQUIRE_TOOLS=1`` is set.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ivsmc
from endpoints import LOOPBACK, receive_exactly
from listening import listen, question
from processes import running
from tools import program

PROPOSAL, ACCEPT, CONFIRM, DECLINE = "1", "2", "3", "4"
"""Types of CLC messages, as the dissector has them."""
MALFORMED = "_ws.malformed or _ws.short or _ws.expert.group == Malformed"
PAYLOAD = bytes(range(256))
"""Fits in one segment."""


@pytest.fixture(autouse=True)
def tools() -> None:
    for tool in ("dumpcap", "tshark"):
        program(tool)


class Capture:
    """What ``dumpcap`` sees of one port of the loopback interface, until a mark it is sent."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.content = b""
        self._dumpcap = subprocess.Popen(
            ["dumpcap", "-q", "-P", "-i", "lo", "-f", f"port {port}", "-w", "-"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def mark(self, text: bytes) -> None:
        """Have it see a datagram with ``text``, and everything that came before."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.sendto(text, ("127.0.0.1", self.port))
        self._read_until(text)

    def begin(self) -> None:
        # The header of the file is written once the interface is open.
        self._read_until(bytes.fromhex("d4c3b2a1"))
        self.mark(b"the capture begins")

    def close(self) -> None:
        self._dumpcap.terminate()
        self._dumpcap.communicate()

    def _read_until(self, text: bytes) -> None:
        assert self._dumpcap.stdout is not None
        assert self._dumpcap.stderr is not None
        while text not in self.content:
            part = os.read(self._dumpcap.stdout.fileno(), 65536)
            if not part:
                pytest.skip(f"dumpcap says: {self._dumpcap.stderr.read().decode().strip()}")
            self.content += part


@contextmanager
def captured(port: int, file: Path) -> Iterator[None]:
    """Capture into ``file`` what the body does on ``port``."""
    capture = Capture(port)
    try:
        capture.begin()
        yield
        capture.mark(b"the capture ends")
    finally:
        capture.close()
    file.write_bytes(capture.content)


def tshark(file: Path, *arguments: str) -> str:
    # Of the ephemeral ports some are other protocols'; SMC is recognised by its eye-catcher.
    command = ["tshark", "-r", str(file), "-o", "tcp.try_heuristic_first:TRUE", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def messages(file: Path, port: int) -> list[tuple[str, str]]:
    """The CLC messages in order: who sent each, of client and listener, and its type."""
    columns = ["-e", "tcp.srcport", "-e", "smc.clc_msg"]
    lines = tshark(file, "-Y", "smc", "-T", "fields", *columns).splitlines()
    return [
        ("listener" if source == str(port) else "client", kind)
        for source, kind in (line.split("\t") for line in lines)
    ]


def test_the_way_to_shared_memory(tmp_path: Path) -> None:
    file = tmp_path / "accept.pcap"
    with ivsmc.create_server(LOOPBACK, require="smc") as listener:
        address = listener.getsockname()
        with captured(address[1], file):
            with ivsmc.create_connection(address, require="smc") as near:
                far, _ = listener.accept()
                with far:
                    far.sendall(PAYLOAD)
                    assert receive_exactly(near, len(PAYLOAD)) == PAYLOAD
    expected = [("client", PROPOSAL), ("listener", ACCEPT), ("client", CONFIRM)]
    assert messages(file, address[1]) == expected
    assert tshark(file, "-Y", MALFORMED) == ""
    assert PAYLOAD not in file.read_bytes()
    shown = tshark(file, "-Y", "smc", "-O", "smc")
    for line, count in {
        "SMC Version: 2": 3,
        "SMC(v2) Type: SMC-D (1)": 1,
        "EID: IVSMC ": 3,
        "First Contact: True": 2,
        "Buffers Size (Compressed Notation): 4 (Size: 256k)": 2,
        "OS Type: Linux (2)": 2,
    }.items():
        assert shown.count(line) == count, f"{line} in\n{shown}"


def test_the_way_back_to_tcp(tmp_path: Path, free_port: int) -> None:
    """The listener declines for want of a common EID; after that the stream is the programs'."""
    file = tmp_path / "decline.pcap"
    address = ("127.0.0.1", free_port)
    with captured(free_port, file), running(listen, address, {"IVSMC_EID": "BLUE"}, {}) as server:
        assert server.receive() == address
        server.send("accept")
        with ivsmc.create_connection(address) as session:
            assert question(session, PAYLOAD) == PAYLOAD
            assert session.fallback_reason is not None
            assert session.fallback_reason.name == "EID_MISMATCH"
        server.receive()
        server.send(None)
        server.receive()
    assert messages(file, free_port) == [("client", PROPOSAL), ("listener", DECLINE)]
    assert tshark(file, "-Y", MALFORMED) == ""
    assert file.read_bytes().count(PAYLOAD) == 2
    shown = tshark(file, "-Y", "smc", "-O", "smc")
    assert shown.count("EID: IVSMC ") == 1
    assert shown.count("Peer Diagnosis Information: 0x03030008") == 1
