"""A process that ends with sessions open ends as one with sockets does: its peers see the end."""

import subprocess
import sys
from pathlib import Path

import pytest

import ivsmc
from endpoints import LOOPBACK, receive_all

LEAVES = """
import sys, ivsmc
session = ivsmc.create_connection(("127.0.0.1", int(sys.argv[1])), device=sys.argv[2])
session.sendall(b"the last words" * 100)
keep = [session, ivsmc.create_server(("127.0.0.1", 0), device=sys.argv[2])]
keep.append(keep)
print(session.transport)
"""


@pytest.mark.filterwarnings("ignore:unclosed")
def test_the_peer_reads_all_and_the_end(device: str) -> None:
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        arguments = [sys.executable, "-c", LEAVES, str(listener.getsockname()[1]), device]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as child:
            session, _ = listener.accept()
            with session:
                assert receive_all(session) == b"the last words" * 100
            assert child.wait() == 0
            assert child.stdout is not None
            assert child.stdout.read().strip() == ("tcp" if device == "none" else "smc")


WAITS_IN_DAEMONS = """
import sys, threading, ivsmc

def serve(session):
    try:
        session.recv(1)
    except OSError:
        # As one does who prints what happened.
        for _ in range(300_000):
            pass

listener = ivsmc.create_server(("127.0.0.1", 0), device=sys.argv[1])
for _ in range(4):
    near = ivsmc.create_connection(listener.getsockname(), device=sys.argv[1])
    far, _address = listener.accept()
    for session in near, far:
        threading.Thread(target=serve, args=(session,), daemon=True).start()
"""


def test_daemon_threads_that_wait_do_not_crash_it(device: str) -> None:
    for _ in range(5):
        arguments = [sys.executable, "-W", "ignore", "-c", WAITS_IN_DAEMONS, device]
        ended = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_the_last_one_to_end_gives_the_local_region_back(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import ivsmc; keep = ivsmc.create_server(('127.0.0.1', 0)); print(ivsmc.devices())"
    place = Path("/dev/shm") / tmp_path_factory.mktemp("local").name
    place.mkdir()
    try:
        monkeypatch.setenv("IVSMC_LOCAL_DIR", str(place))
        monkeypatch.setenv("IVSMC_DEVICE", "local")
        run = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert "'usable': True" in run.stdout
        left = [path for path in place.rglob("*") if not path.is_dir()]
        assert left == []
    finally:
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        place.rmdir()
