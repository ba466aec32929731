"""The command line: nc both ways, bench, devices, server, and their mistakes."""

import importlib.metadata
import json
import os
import re
import socket
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import pytest

import ivsmc
from commands import IVSMC, command
from conftest import running_server
from endpoints import LOOPBACK, receive_all

CONTENT = os.urandom(3_000_000)


def expected_way(device: str) -> str:
    return "TCP: DISABLED" if device == "none" else "shared memory"


class Netcat:
    """``ivsmc nc`` that prints into a file: a pipe nobody reads would stop it."""

    def __init__(self, *arguments: str, stdin: int | IO[bytes] = subprocess.PIPE) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - closed by finish
        self.process = subprocess.Popen(
            [*IVSMC, "nc", *arguments],
            stdin=stdin,
            stdout=self._out,
            stderr=subprocess.PIPE,
        )

    def said(self) -> str:
        """The next line on standard error."""
        assert self.process.stderr is not None
        return self.process.stderr.readline().decode()

    def finish(self, send: bytes | None = None) -> tuple[bytes, str]:
        """Give it ``send`` and the end of input; return what it printed."""
        _, err = self.process.communicate(send)
        assert self.process.returncode == 0, err
        with self._out as file:
            file.seek(0)
            return file.read(), err.decode()


def test_nc_from_file_to_file(device: str, free_port: int, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(CONTENT)
    port = str(free_port)
    server = Netcat("-l", "--device", device, "127.0.0.1", port, stdin=subprocess.DEVNULL)
    assert server.said() == f"ivsmc nc: listening on 127.0.0.1:{port}\n"
    with source.open("rb") as file:
        client = Netcat("--device", device, "127.0.0.1", port, stdin=file)
        out, err = client.finish()
    assert out == b""
    assert f"connected to 127.0.0.1:{port} over {expected_way(device)}" in err
    out, err = server.finish()
    assert out == CONTENT
    assert f"over {expected_way(device)}" in err


def test_nc_carries_both_directions_at_once(device: str, free_port: int) -> None:
    """Its input ends first; what the peer sends after that still comes out."""
    server = Netcat("-l", "--device", device, str(free_port))
    assert "listening" in server.said()
    with ivsmc.create_connection(("127.0.0.1", free_port), device=device) as session:
        assert server.process.stdin is not None
        server.process.stdin.write(b"from standard input")
        server.process.stdin.close()
        server.process.stdin = None
        assert receive_all(session) == b"from standard input"
        session.sendall(CONTENT)
        session.shutdown(socket.SHUT_WR)
        out, _ = server.finish()
    assert out == CONTENT


def test_nc_talks_to_plain_sockets() -> None:
    with socket.create_server(LOOPBACK) as listener:
        port = listener.getsockname()[1]
        client = Netcat("127.0.0.1", str(port))
        far, _ = listener.accept()
        with far:
            far.sendall(b"plain")
            far.shutdown(socket.SHUT_WR)
            out, err = client.finish(b"question")
            assert receive_all(far) == b"question"
    assert out == b"plain"
    assert "over TCP: PEER_NO_SMC (0x03010000" in err


def test_nc_gives_up(free_port: int) -> None:
    refused = command("nc", "127.0.0.1", str(free_port))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == "ivsmc: Connection refused\n"
    nobody = command("nc", "-l", "--timeout", "0.01", "127.0.0.1", str(free_port))
    assert nobody.returncode == 1
    assert nobody.stderr.endswith("ivsmc: timed out\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nc", "9000"], "HOST PORT is needed"),
        (["nc", "a", "b", "9000"], "HOST PORT is needed"),
        (["nc", "host", "http"], "not a port: 'http'"),
        (["nc", "-l", "70000"], "not a port: '70000'"),
        (["nc", "a..b", "80"], "not a host: 'a..b'"),
        (["nc", "--timeout", "-1", "host", "1"], "'-1' is not in"),
        (["bench", "--connect", "a..b:9700"], "not a host: 'a..b'"),
        (["bench", "--listen", "[a..b]:9700"], "not a host: 'a..b'"),
        (["doctor", "--to", "a..b:1"], "not a host: 'a..b'"),
        (["doctor", "--to", f"{'a' * 64}:1"], "not a host"),
        (["bench", "--bytes", "much"], "not a size: 'much'"),
        (["bench", "--transports", "ivsmc,carrier"], "unknown transport 'carrier'"),
        (["server", "--vectors", "0"], "'0' is not in"),
        (["server", "--group", "99999999999"], "no number of a group"),
        (["server", "--mode", "999"], "not permissions: '999'"),
        (["server", "--size", "99999999999G"], "more than any file can hold"),
        (["fly"], "invalid choice: 'fly'"),
        ([], "required"),
    ],
)
def test_what_is_wrong_with_the_arguments(arguments: list[str], words: str) -> None:
    result = command(*arguments)
    assert result.returncode == 2
    assert words in result.stderr


def test_bench_as_json(device: str) -> None:
    small = ["--round-trips", "200", "--bytes", "4M", "--rounds", "2"]
    result = command("bench", "--json", "--device", device, *small)
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert [entry["name"] for entry in report["results"]] == ["ivsmc", "tcp", "unix"]
    assert report["round_trips"] == 400
    assert report["stream_bytes"] == 2 * 4 * 1024 * 1024
    for entry in report["results"]:
        assert entry["checked_bytes"] == 4 * 1024 * 1024
        assert 0 < entry["round_trip_p50_us"] <= entry["round_trip_p99_us"]
        assert entry["bytes_per_second"] > 0
    ivsmc_result, tcp, _ = report["results"]
    assert tcp["round_trip_times_tcp"] == tcp["throughput_times_tcp"] == 1.0
    if device == "none":
        assert ivsmc_result["transport"] == "tcp"
        assert ivsmc_result["fallback_reason"].startswith("DISABLED")
    else:
        assert (ivsmc_result["transport"], ivsmc_result["fallback_reason"]) == ("smc", None)


def test_bench_as_a_table() -> None:
    result = command("bench", "--round-trips", "200", "--bytes", "1M", "--rounds", "1")
    assert (result.returncode, result.stderr) == (0, "")
    for label in ("ivsmc (smc)", "TCP loopback", "AF_UNIX stream"):
        assert re.search(rf"^{re.escape(label)} +[\d.]+ +[\d.]+ +[\d.]+ x", result.stdout, re.M)


def test_bench_does_not_fall_back_silently() -> None:
    result = command("bench", "--device", "none", "--require", "smc")
    assert result.returncode == 1
    assert "DISABLED" in result.stderr


def test_devices(device_specs: dict[str, str]) -> None:
    usable = ",".join(spec for kind, spec in device_specs.items() if kind != "none")
    environment = {**os.environ, "IVSMC_DEVICE": f"{usable},file:/nonexistent/region"}
    table = command("devices", env=environment)
    assert table.returncode == 0, table.stderr
    assert re.search(r"^file:/nonexistent/region +no +.*there is no such file", table.stdout, re.M)
    listed = json.loads(command("devices", "--json", env=environment).stdout)
    assert {entry["spec"] for entry in listed if entry["usable"]} == set(usable.split(","))


def test_no_device_is_usable() -> None:
    result = command("devices", env={**os.environ, "IVSMC_DEVICE": "file:/nonexistent/region"})
    assert result.returncode == 1


def test_a_second_server_on_one_socket(device_specs: dict[str, str]) -> None:
    path = device_specs["host"].removeprefix("host:")
    result = command("server", path)
    assert result.returncode == 1
    assert path in result.stderr


def test_a_server_takes_the_size_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "region"
    with file.open("wb") as region:
        region.truncate(2 << 20)
    arguments = ["server", "--file", str(file), str(tmp_path / "socket")]
    with subprocess.Popen([*IVSMC, *arguments], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "region of 2097152 bytes, 1 vector a peer" in process.stderr.readline()
        process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "mode"), [([], 0o600), (["--group"], 0o660), (["--mode", "606", "--group"], 0o606)]
)
def test_who_may_join_a_server(tmp_path: Path, options: list[str], mode: int) -> None:
    # Only root gives files to any group.
    group = os.getgid() + (os.getuid() == 0 and "--group" in options)
    path = tmp_path / "socket"
    with running_server(path, *options, *([str(group)] if "--group" in options else [])):
        status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (mode, group)


def test_a_path_that_cannot_be_made_is_named() -> None:
    result = command("server", "/proc/nowhere/socket")
    assert (result.returncode, result.stderr) == (
        1,
        "ivsmc: /proc/nowhere: No such file or directory\n",
    )


def test_output_that_cannot_be_written() -> None:
    """One line, whether the output is buffered or not."""
    environment = {name: value for name, value in os.environ.items() if "UNBUFFERED" not in name}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*IVSMC, "devices"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=environment,
        )
    assert (result.returncode, result.stderr) == (1, "ivsmc: No space left on device\n")


def test_devices_when_switched_off() -> None:
    result = command("devices", env={**os.environ, "IVSMC_DEVICE": "none"})
    assert (result.returncode, result.stderr) == (1, "")
    assert "switched off" in result.stdout


def test_version() -> None:
    assert command("--version").stdout == f"{importlib.metadata.version('ivsmc')}\n"
