"""Fixtures: one device of every kind, connected pairs on each, and nothing may be left behind.

``pair`` also comes as two plain sockets, so that what a test says about sessions is said about the
standard library's sockets too.
"""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from endpoints import Endpoint, session_pair, socket_pair
from ivsmc import _native
from ivsmc._cli.arguments import size

DEVICE_KINDS = ("local", "file", "host", "none")
REGION_BYTES = 64 * 1024 * 1024
SHM = Path("/dev/shm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stream-bytes",
        type=size,
        default=size("256M"),
        help="bytes each way of the stream test, per device (default: 256M)",
    )


@pytest.fixture(scope="session", autouse=True)
def device_specs() -> Iterator[dict[str, str]]:
    """The spec of one device of every kind, shared by all tests of the run."""
    gc.freeze()  # what pytest and its plugins hold need not be looked at after every test
    resource_tracker.ensure_running()  # multiprocessing's own; not a leak of the first test
    with contextlib.ExitStack() as cleanup:
        # file: wants a file system that shares memory.
        where = Path(tempfile.mkdtemp(prefix="ivsmc-tests-", dir=SHM))
        cleanup.callback(shutil.rmtree, where)
        region = where / "region"
        with region.open("xb") as file:
            file.truncate(REGION_BYTES)
        socket_path = where / "ivs.sock"
        cleanup.enter_context(running_server(socket_path))
        yield {
            "local": "local",
            "file": f"file:{region}",
            "host": f"host:{socket_path}",
            "none": "none",
        }


@contextlib.contextmanager
def running_server(path: Path) -> Iterator[None]:
    """``ivsmc server`` on the Unix socket ``path``, ready for clients."""
    arguments = [sys.executable, "-m", "ivsmc", "server", str(path), "--size", str(REGION_BYTES)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            ready = server.stderr.readline()
            assert "listening" in ready, ready + server.stderr.read()
            yield
        finally:
            server.terminate()
            left = server.stderr.read()
    assert server.returncode == 0, left
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


@dataclass
class Resources:
    """What this process holds of the machine."""

    descriptors: Counter[str]
    threads: int
    mappings: int
    shm_names: set[str]

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
            # The directory of `local` may stay, what it holds may not.
            shm_names={
                str(path)
                for top in SHM.glob("ivsmc-*")
                for path in (top.iterdir() if top.name == f"ivsmc-{os.getuid()}" else [top])
                if path.stat().st_blocks or path.is_dir()
            },
        )


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Descriptors, threads, mappings and files of a test are gone when it is over."""
    before = Resources.now()
    yield
    gc.collect()
    _native.shutdown()
    after = Resources.now()
    assert after.descriptors - before.descriptors == Counter()
    assert after.threads <= before.threads
    assert after.mappings <= before.mappings
    assert after.shm_names <= before.shm_names
