"""What the processes of the tests of limits do: those short of descriptors, those short of room."""

import ctypes
import errno
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import ivsmc
from crowd import PATIENCE, Holdings, warm_up_alone
from endpoints import LOOPBACK, Endpoint, receive_all
from processes import Here
from random_stream import exchange

NEW_NAMESPACE = 0x00020000
"""``CLONE_NEWNS`` of ``linux/sched.h``."""
PRIVATE_BELOW = 0x4000 | 0x40000
"""``MS_REC | MS_PRIVATE`` of ``linux/mount.h``."""
BUFFER = 256 * 1024
"""Bytes of the buffers of sessions on a small file system."""
TOTAL = 40 * BUFFER
"""Bytes each way of a stream there."""

Outcome = tuple[str, str]
"""What came of an attempt: a transport or the name of an exception, and what it says."""


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Allow this process to open ``count`` descriptors more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = free = 0
    while free < count or _is_open(limit):
        free += not _is_open(limit)
        limit += 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def answer(here: Here, device: str) -> None:
    """Send back what clients send, to the end; who asks for it is the last one."""
    with ivsmc.create_server(LOOPBACK, backlog=64, device=device) as listener:
        here.send(listener.getsockname())
        text = b""
        while text != b"stop":
            session, _ = listener.accept()
            # Clients that could not go on leave without a word.
            with session, suppress(ConnectionError):
                text = receive_all(session)
                session.sendall(text)


def ask(address: tuple[str, int], device: str, question: bytes = b"question") -> Outcome:
    """Have ``answer`` answer; how that went."""
    try:
        with ivsmc.create_connection(address, device=device) as session:
            session.sendall(question)
            session.shutdown(socket.SHUT_WR)
            assert receive_all(session) == question
            return session.transport, str(session.fallback_reason)
    except OSError as error:
        return type(error).__name__, str(error)


def ask_with(count: int, address: tuple[str, int], device: str) -> tuple[Outcome, Outcome]:
    """Ask while only ``count`` descriptors are to be had, and when that is over."""
    with descriptors_left(count):
        first = ask(address, device)
    return first, _until_smc(lambda: ask(address, device))


def _until_smc(attempt: Callable[[], Outcome]) -> Outcome:
    """Try until it is shared memory: that a device could not be opened is remembered a second."""
    end = time.monotonic() + PATIENCE
    while (outcome := attempt())[0] != "smc" and time.monotonic() < end:
        time.sleep(0.1)
    return outcome


def listen_with(count: int, device: str) -> Outcome:
    """Listen while only ``count`` descriptors are to be had, and when that is over."""
    try:
        with descriptors_left(count), ivsmc.create_server(LOOPBACK, device=device):
            first = "listening", ""
    except OSError as error:
        first = type(error).__name__, str(error)
    end = time.monotonic() + PATIENCE
    while True:
        try:
            with ivsmc.create_server(LOOPBACK, device=device):
                return first
        except ivsmc.DeviceError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def accept_with_none(here: Here, device: str, seconds: float) -> float:
    """Accept while no descriptor is to be had, and answer when that is over.

    Returns the CPU seconds that ``seconds`` of a client in the queue took.
    """
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        warm_up_alone(device)
        here.send(listener.getsockname())
        with listener.accept()[0] as first:
            receive_all(first)
        before = Holdings.now()
        with descriptors_left(0):
            here.send("none left")
            here.receive()  # the next client is there
            listener.settimeout(PATIENCE)
            for _ in range(2):
                with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
                    listener.accept()
            used = time.process_time()
            time.sleep(seconds)
            used = time.process_time() - used
        here.send("enough")
        session, _ = listener.accept()
        with session:
            session.sendall(receive_all(session))
        assert not Holdings.now().grown_since(before)
        return used


def on_a_small_file_system(_here: Here, root: Path, size: int, action: str) -> object:
    """Run ``action`` of this module where ``root`` is a file system of ``size`` bytes."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(NEW_NAMESPACE))
    check(libc.mount(b"none", b"/", None, PRIVATE_BELOW, None))
    check(libc.mount(b"none", bytes(root), b"tmpfs", 0, f"size={size}".encode()))
    os.environ["IVSMC_LOCAL_DIR"] = str(root)
    result: object = {"full before": full_before, "full meanwhile": full_meanwhile}[action](root)
    return result


def fill(root: Path) -> Path:
    """Leave no page free; return the file to remove."""
    filler = root / "filler"
    with filler.open("wb", buffering=0) as file:
        for piece in (1 << 20, 1 << 12):
            with suppress(OSError):
                while file.write(bytes(piece)):
                    pass
    assert os.statvfs(root).f_bavail == 0
    return filler


def pair(device: str | None) -> tuple[ivsmc.Session, ivsmc.Session]:
    """Both ends of a session, over whatever it is."""
    with (
        ThreadPoolExecutor(1) as pool,
        ivsmc.create_server(LOOPBACK, device=device, buffer=BUFFER) as listener,
    ):
        accepting = pool.submit(listener.accept)
        near = ivsmc.create_connection(listener.getsockname(), device=device, buffer=BUFFER)
        return near, accepting.result()[0]


def stream(near: Endpoint, far: Endpoint) -> None:
    """Streams both ways at once."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(exchange, far, 1, 2, TOTAL)
        exchange(near, 2, 1, TOTAL)
        other.result()


def full_before(root: Path) -> list[Outcome]:
    """What sessions are when there was no room from the beginning, and when there is."""
    filler = fill(root)
    near, far = pair(None)
    with near, far:
        stream(near, far)
        outcomes: list[Outcome] = [(near.transport, str(near.fallback_reason))]
    try:
        ivsmc.open_device("local").close()
    except ivsmc.DeviceError as error:
        outcomes.append(("DeviceError", str(error)))
    filler.unlink()

    def again() -> Outcome:
        near, far = pair(None)
        with near, far:
            stream(near, far)
            return near.transport, str(near.fallback_reason)

    return [*outcomes, _until_smc(again)]


def full_meanwhile(root: Path) -> tuple[Outcome, Outcome]:
    """What the first session is that finds no room, and the next when there is some again.

    Those that have their memory go on.
    """
    sessions = [pair("local")]
    filler = fill(root)
    try:
        while sessions[-1][0].transport == "smc":
            sessions.append(pair("local"))
        for near, far in sessions:
            stream(near, far)
        last = sessions[-1][0]
        filler.unlink()
        sessions.append(pair("local"))
        stream(*sessions[-1])
        new = sessions[-1][0]
        return (
            (last.transport, str(last.fallback_reason)),
            (new.transport, str(new.fallback_reason)),
        )
    finally:
        for ends in sessions:
            for end in ends:
                end.close()
