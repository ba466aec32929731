"""Signals: Ctrl-C ends every call that waits, handlers that return end none, nothing gets lost."""

import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

import ivsmc
import waiters
from blocked import until_blocked
from endpoints import LOOPBACK, Endpoint, fill, receive_exactly
from processes import running

Pair = tuple[Endpoint, Endpoint]
Handler = Callable[[int, FrameType | None], object]
INTERVAL = 0.02
"""Seconds between two signals."""
MANY = 500
"""Signals in ten seconds: a call that should have timed out after half a second has not."""


def assert_interrupted(waiter: Callable[..., None], *arguments: object) -> None:
    """Run ``waiter`` in a process of its own, press Ctrl-C while it waits, see it succeed."""
    with running(waiter, *arguments) as remote:
        assert remote.receive() == "waiting"
        until_blocked(remote.process.pid)
        os.kill(remote.process.pid, signal.SIGINT)
        assert remote.pipe.poll(60), "it goes on waiting"
        assert remote.receive() is None


@pytest.mark.parametrize("call", waiters.RECEIVING)
def test_ctrl_c_ends_receiving(device: str, call: str) -> None:
    assert_interrupted(waiters.receive_interrupted, device, call)


@pytest.mark.parametrize("call", waiters.SENDING)
def test_ctrl_c_ends_sending(device: str, call: str) -> None:
    assert_interrupted(waiters.send_interrupted, device, call)


@pytest.mark.parametrize("flags", [0, socket.MSG_PEEK], ids=["take", "peek"])
def test_ctrl_c_ends_receiving_of_all(device: str, flags: int) -> None:
    assert_interrupted(waiters.receive_all_interrupted, device, flags)


@pytest.mark.parametrize("timeout", [None, waiters.LONG])
def test_ctrl_c_ends_accept(device: str, timeout: float | None) -> None:
    assert_interrupted(waiters.accept_interrupted, device, timeout)


@pytest.mark.parametrize("timeout", [None, waiters.LONG])
def test_ctrl_c_ends_connect(device: str, timeout: float | None) -> None:
    with ivsmc.create_server(LOOPBACK, device=device, backlog=0) as listener:
        with waiters.full_queue(listener):
            assert_interrupted(waiters.connect_interrupted, device, listener.getsockname(), timeout)


@pytest.mark.parametrize("timeout", [None, waiters.LONG])
def test_ctrl_c_ends_connect_to_a_plain_listener(device: str, timeout: float | None) -> None:
    with socket.create_server(LOOPBACK, backlog=0) as listener:
        with waiters.full_queue(listener):
            assert_interrupted(waiters.connect_interrupted, device, listener.getsockname(), timeout)


def test_ctrl_c_ends_the_handshake(shared_device: str) -> None:
    with ivsmc.create_server(LOOPBACK, device=shared_device) as listener:
        assert_interrupted(waiters.handshake_interrupted, shared_device, listener.getsockname())


class Alarms:
    """Signals that a handler is called for."""

    def every(self, seconds: float, handler: Handler) -> None:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def once_after(self, seconds: float, handler: Handler) -> None:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture
def alarms() -> Iterator[Alarms]:
    before = signal.getsignal(signal.SIGALRM)
    made = Alarms()
    yield made
    made.stop()
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("call", ["recv", "send", "sendall"])
def test_signals_do_not_lengthen_a_timeout(pair: Pair, alarms: Alarms, call: str) -> None:
    """PEP 475: the call goes on after a handler that returns, for what is left of its time."""
    near, _ = pair
    if call != "recv":
        fill(near)
    near.settimeout(0.5)
    signals = itertools.count()
    alarms.every(INTERVAL, lambda *_: next(signals))
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        while True:  # a send that the other end's kernel makes room for starts anew
            getattr(near, call)(1 if call == "recv" else bytes(1 << 20))
    assert time.monotonic() - start >= 0.5
    assert 0 < next(signals) < MANY


def test_signals_do_not_lengthen_the_timeout_of_accept(device: str, alarms: Alarms) -> None:
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        listener.settimeout(0.5)
        signals = itertools.count()
        alarms.every(INTERVAL, lambda *_: next(signals))
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            listener.accept()
        assert time.monotonic() - start >= 0.5
        assert 0 < next(signals) < MANY


def test_signals_do_not_lengthen_the_timeout_of_connect(device: str, alarms: Alarms) -> None:
    with running(waiters.hold_a_full_queue, device) as remote:
        address = remote.receive()
        signals = itertools.count()
        alarms.every(INTERVAL, lambda *_: next(signals))
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            ivsmc.create_connection(address, 0.5, device=device)
        assert time.monotonic() - start >= 0.5
        alarms.stop()
        assert 0 < next(signals) < MANY
        remote.send("enough")
        assert remote.receive() is None


def test_a_handler_that_returns_ends_no_call(pair: Pair, alarms: Alarms) -> None:
    near, far = pair
    left = iter(range(10))

    def answer_at_last(*_: object) -> None:
        if next(left) == 8:
            far.sendall(b"at last")

    alarms.every(INTERVAL, answer_at_last)
    assert near.recv(64) == b"at last"
    assert receive_exactly(near, 0) == b""


def test_signals_lose_no_bytes(pair: Pair, alarms: Alarms) -> None:
    """Both directions at once, under a storm of signals."""
    near, far = pair
    data = random.Random(1).randbytes(20_000_000)
    echoed: list[bytes] = []

    def echo() -> None:
        while part := far.recv(65536):
            far.sendall(part)
        far.shutdown(socket.SHUT_WR)

    def receive() -> None:
        echoed.append(receive_exactly(near, len(data) + 1))

    threads = [threading.Thread(target=echo), threading.Thread(target=receive)]
    for thread in threads:
        thread.start()
    signals = itertools.count()
    alarms.every(0.0005, lambda *_: next(signals))
    near.sendall(data)
    near.shutdown(socket.SHUT_WR)
    for thread in threads:
        thread.join()
    assert echoed == [data]
    assert next(signals) > 0


def test_a_signal_that_comes_before_the_sleep_is_not_lost(pair: Pair, alarms: Alarms) -> None:
    """A call looks for a while before it sleeps, and a signal then does not interrupt the sleep.

    Like a socket's, it is lost still where it comes in the last moment before; so not all count.
    """

    class Raised(Exception):
        pass

    near, _ = pair
    near.settimeout(1)
    moments = random.Random(1)
    rounds, lost = 100, 0
    for _ in range(rounds):
        came = threading.Event()
        inside = True

        def handle(*_: object) -> None:
            came.set()  # noqa: B023  # it runs within its round
            if inside:  # noqa: B023
                raise Raised

        try:
            alarms.once_after(moments.uniform(1e-6, 1e-4), handle)
            near.recv(1)
        except Raised:
            inside = False
        except TimeoutError:
            inside = False
            lost += 1
        came.wait()
    assert lost < rounds / 4


def test_a_signal_on_another_thread_is_handled_and_ends_no_call(pair: Pair) -> None:
    near, far = pair
    handled = threading.Event()
    received: list[bytes] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    try:
        thread = threading.Thread(target=lambda: received.append(near.recv(64)))
        thread.start()
        assert thread.native_id is not None
        assert thread.ident is not None
        until_blocked(os.getpid(), thread.native_id)
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        while not handled.is_set():
            pass  # the main thread handles it once it runs; a lock would not let it
        until_blocked(os.getpid(), thread.native_id)
        assert received == []
        far.sendall(b"after it")
        thread.join()
        assert received == [b"after it"]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_ends_the_main_threads_call_and_nobody_elses(pair: Pair, alarms: Alarms) -> None:
    """Two threads sleep on one end; the main one is taken out, whichever of them leads."""

    class Raised(Exception):
        pass

    is_expected = False

    def handle(*_: object) -> None:
        nonlocal is_expected
        if is_expected:  # not once more, before the signals are stopped
            is_expected = False
            raise Raised

    near, far = pair
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(near.recv(1)))
    for is_first in (True, False):
        if is_first:
            thread.start()
            assert thread.native_id is not None
            until_blocked(os.getpid(), thread.native_id)
        with pytest.raises(Raised):
            is_expected = True
            alarms.every(INTERVAL, handle)
            near.recv(1)
        alarms.stop()
    assert received == []
    far.sendall(b"2")
    thread.join()
    assert received == [b"2"]


SCRIPTS = {
    "open sessions": "",
    "a thread in recv": "start(near.recv, 1)",
    "a thread in recv with a short timeout": """
near.settimeout(0.001)
def receive():
    while True:
        try: near.recv(1)
        except TimeoutError: pass
start(receive)
""",
    "a thread in sendall": "start(near.sendall, bytes(1 << 26))",
    "a thread in accept": "start(listener.accept)",
    "a thread in accept with a short timeout": """
listener.settimeout(0.001)
def accept():
    while True:
        try: listener.accept()
        except TimeoutError: pass
start(accept)
""",
    "a stream in threads": """
def receive():
    while True: far.recv(65536)
def send():
    while True: near.sendall(bytes(1 << 20))
start(receive)
start(send)
""",
    "a busy exchange": """
def echo():
    while True: far.sendall(far.recv(1))
def ask():
    while True:
        near.sendall(b"?")
        near.recv(1)
start(echo)
start(ask)
""",
    "connects in a thread": """
def connect():
    while True: ivsmc.create_connection(listener.getsockname(), device=device).close()
def accept():
    while True: listener.accept()[0].close()
start(connect)
start(accept)
""",
    "a thread in recv that atexit wakes": """
import atexit
def receive():
    try: near.recv(1)
    except OSError: time.sleep(1000)
start(receive)
atexit.register(near.close)
""",
}
PROLOGUE = """
import sys, threading, time
import ivsmc
device = sys.argv[1]
listener = ivsmc.create_server(("127.0.0.1", 0), device=device)
near = ivsmc.create_connection(listener.getsockname(), device=device)
far, _ = listener.accept()
assert near.transport == ("tcp" if device == "none" else "smc")
def start(function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True).start()
"""
EPILOGUE = """
time.sleep(0.05)  # so that the threads are inside: nothing says when
print("over")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_interpreter_ends_with_sessions_open(device: str, script: str) -> None:
    """Daemon threads wait in calls, or run, when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + SCRIPTS[script] + EPILOGUE, device],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_the_interpreter_ends_while_an_interrupt_is_handled(device: str) -> None:
    """Ctrl-C, not caught: a traceback and the status of a signal, at once."""
    script = PROLOGUE + "print('waiting', flush=True)\nnear.recv(1)\n"
    with subprocess.Popen(
        [sys.executable, "-c", script, device],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        until_blocked(process.pid)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert said.endswith("KeyboardInterrupt\n")
