"""Fixtures: one device of every kind, connected pairs on each, and nothing may be left behind.

``pair`` also comes as two plain sockets, so that what a test says about sessions is said about the
standard library's sockets too.

Tests that this machine cannot run are skipped with the reason. ``IVSMC_REQUIRE_TOOLS=1`` makes that
a failure, for those of ``tests/vm`` (which need QEMU and a kernel) ``IVSMC_REQUIRE_VM=1``.
"""

import contextlib
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from endpoints import LOOPBACK, Endpoint, session_pair, socket_pair
from ivsmc import _native
from ivsmc._cli.arguments import size

DEVICE_KINDS = ("local", "file", "host", "none")
REGION_BYTES = 64 * 1024 * 1024
SESSION_BYTES = 64 * 1024
"""Of the region at least, for each of many sessions at once: twice what their buffers take."""
SHM = Path("/dev/shm")
MATCH_MS = 5000
"""A busy machine may halt a process for longer than connects wait by default."""


def pytest_configure() -> None:
    # A shell starts its background jobs with SIGINT ignored, and all their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stream-bytes",
        type=size,
        default=size("256M"),
        help="bytes each way of the stream test, per device (default: 256M)",
    )
    for name, default, text in (
        ("--sessions", 1000, "sessions at once between two processes"),
        ("--processes", 200, "processes attached to one region at once"),
        ("--connects", 3000, "sessions connected and closed one after the other, per device"),
        ("--vm-ends", 2, "times a guest is reset or killed in mid-stream"),
        ("--restarts", 12, "times an ivshmem server is killed under its clients"),
    ):
        parser.addoption(name, type=int, default=default, help=f"{text} (default: {default})")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    needed = "IVSMC_REQUIRE_VM" if "vm" in item.path.parts else "IVSMC_REQUIRE_TOOLS"
    if report.skipped and os.environ.get(needed) == "1":
        report.outcome = "failed"
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"{needed}=1, but {why}"
    return report


@pytest.fixture(scope="session", autouse=True)
def device_specs(pytestconfig: pytest.Config) -> Iterator[dict[str, str]]:
    """The spec of one device of every kind, shared by all tests of the run."""
    sessions: int = pytestconfig.getoption("--sessions")
    # The memory of a PCI device is a power of two.
    region_bytes = max(REGION_BYTES, 1 << (SESSION_BYTES * sessions - 1).bit_length())
    gc.freeze()  # what pytest and its plugins hold need not be looked at after every test
    resource_tracker.ensure_running()  # multiprocessing's own; not a leak of the first test
    with contextlib.ExitStack() as cleanup:
        # file: wants a file system that shares memory; local: of this run must be nobody else's.
        where = Path(tempfile.mkdtemp(prefix="ivsmc-tests-", dir=SHM))
        cleanup.callback(shutil.rmtree, where)
        os.environ["IVSMC_LOCAL_DIR"] = str(where)
        cleanup.callback(os.environ.pop, "IVSMC_LOCAL_DIR")
        os.environ.pop("IVSMC_DEVICE", None)
        os.environ["IVSMC_MATCH_MS"] = str(MATCH_MS)
        cleanup.callback(os.environ.pop, "IVSMC_MATCH_MS")
        region = where / "region"
        with region.open("xb") as file:
            file.truncate(region_bytes)
        socket_path = where / "ivs.sock"
        cleanup.enter_context(running_server(socket_path, size=region_bytes))
        yield {
            "local": "local",
            "file": f"file:{region}",
            "host": f"host:{socket_path}",
            "none": "none",
        }


@contextlib.contextmanager
def running_server(path: Path, *options: str, size: int = REGION_BYTES) -> Iterator[None]:
    """``ivsmc server`` on the Unix socket ``path``, ready for clients."""
    arguments = [sys.executable, "-m", "ivsmc", "server", str(path), "--size", str(size)]
    arguments += options
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            ready = server.stderr.readline()
            assert "listening" in ready, ready + server.stderr.read()
            # It says who comes and goes: read on, or it would wait for room in the pipe.
            said: list[str] = []
            reader = threading.Thread(target=said.extend, args=(server.stderr,))
            reader.start()
            yield
        finally:
            server.terminate()
        reader.join()
    assert server.returncode == 0, said
    assert not path.exists()


@pytest.fixture(params=DEVICE_KINDS)
def device(request: pytest.FixtureRequest, device_specs: dict[str, str]) -> str:
    """A device spec, each in turn."""
    return device_specs[request.param]


@pytest.fixture(params=[kind for kind in DEVICE_KINDS if kind != "none"])
def shared_device(request: pytest.FixtureRequest, device_specs: dict[str, str]) -> str:
    """A device spec with shared memory, each in turn."""
    return device_specs[request.param]


@pytest.fixture(params=["socket", *DEVICE_KINDS])
def pair(
    request: pytest.FixtureRequest, device_specs: dict[str, str]
) -> Iterator[tuple[Endpoint, Endpoint]]:
    """Two connected ends, the connecting one first: sockets, then sessions on every device."""
    ends: tuple[Endpoint, Endpoint]
    kind = request.param
    ends = socket_pair() if kind == "socket" else session_pair(device_specs[kind])
    with ends[0], ends[1]:
        yield ends


@pytest.fixture
def free_port() -> int:
    """A port of the loopback interface that nobody uses.

    The kernel does not choose it for other connections: it is below those that it chooses from.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest // 2, lowest)
        with contextlib.suppress(OSError), socket.socket() as once:
            once.bind((LOOPBACK[0], port))
            return port


@dataclass
class Resources:
    """What this process holds of the machine."""

    descriptors: Counter[str]
    threads: int
    mappings: int
    files: set[str]

    @classmethod
    def now(cls) -> "Resources":
        descriptors: Counter[str] = Counter()
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists them
                descriptors[str(entry.readlink())] += 1
        maps = Path("/proc/self/maps").read_text().splitlines()
        return cls(
            descriptors=descriptors,
            threads=sum(1 for _ in Path("/proc/self/task").iterdir()),
            mappings=sum("ivsmc" in line and ".so" not in line for line in maps),
            files={str(path) for path in Path(os.environ["IVSMC_LOCAL_DIR"]).rglob("*")},
        )


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Descriptors, threads, mappings and files of a test are gone when it is over."""
    before = Resources.now()
    yield
    gc.collect()
    _native.shutdown()
    after = Resources.now()
    for _ in range(1000):  # a thread that was joined is still listed for a moment
        if after.threads <= before.threads:
            break
        os.sched_yield()
        after = Resources.now()
    assert after.descriptors - before.descriptors == Counter()
    assert after.threads <= before.threads
    assert after.mappings <= before.mappings
    assert after.files <= before.files
