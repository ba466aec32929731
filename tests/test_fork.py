"""``fork()`` with sessions open: they stay the parent's, and everything new works in the child."""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import ivsmc
from crowd import answer_questions, ask
from endpoints import LOOPBACK, receive_all, session_pair
from forking import forked, ignore_threads
from listening import echo, question
from processes import running
from random_stream import exchange

pytestmark = ignore_threads

SESSION_METHODS: dict[str, Callable[[ivsmc.Session], object]] = {
    "recv": lambda session: session.recv(1),
    "recv_into": lambda session: session.recv_into(bytearray(1)),
    "recvfrom": lambda session: session.recvfrom(1),
    "recvfrom_into": lambda session: session.recvfrom_into(bytearray(1)),
    "recvmsg": lambda session: session.recvmsg(1),
    "recvmsg_into": lambda session: session.recvmsg_into([bytearray(1)]),
    "send": lambda session: session.send(b"x"),
    "sendall": lambda session: session.sendall(b"x"),
    "sendmsg": lambda session: session.sendmsg([b"x"]),
    "sendto": lambda session: session.sendto(b"x", LOOPBACK),
    "shutdown": lambda session: session.shutdown(socket.SHUT_RDWR),
    "fileno": lambda session: session.fileno(),
    "getsockname": lambda session: session.getsockname(),
    "getpeername": lambda session: session.getpeername(),
    "getsockopt": lambda session: session.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
    "setsockopt": lambda session: session.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    "makefile": lambda session: session.makefile("rb", buffering=0).read(1),
}


def expected(device: str) -> str:
    return "tcp" if device == "none" else "smc"


def refusals(session: ivsmc.Session) -> dict[str, str]:
    """What each method of an inherited session raises."""
    found = {}
    for name, call in SESSION_METHODS.items():
        try:
            found[name] = f"returned {call(session)!r}"
        except OSError as error:
            found[name] = type(error).__name__
    with pytest.raises(ivsmc.ForkedSession, match=r"opened before fork\(\)"):
        session.recv(1)
    with session:  # closing what is the parent's is harmless
        assert session.closed
    return found


def open_files() -> set[str]:
    """What the descriptors of this process are."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.add(str(entry.readlink()))
    return found


def test_inherited_sessions_are_refused_and_the_parents_go_on(device: str) -> None:
    near, far = session_pair(device)
    with near, far:
        near.sendall(b"before")
        with forked(lambda: (refusals(near), refusals(far))) as child:
            assert child.result() == (dict.fromkeys(SESSION_METHODS, "ForkedSession"),) * 2
            near.sendall(b" meanwhile")
        near.sendall(b" after")
        near.shutdown(socket.SHUT_WR)
        assert receive_all(far) == b"before meanwhile after"
        far.sendall(b"and back")
        far.close()
        assert receive_all(near) == b"and back"


def test_a_child_holds_nothing_of_its_parents_sessions(device: str) -> None:
    before = open_files()
    near, far = session_pair(device)
    with near, far:
        near.fileno()
        of_the_pair = open_files() - before
        assert of_the_pair

        def held() -> tuple[set[str], list[str]]:
            maps = Path("/proc/self/maps").read_text().splitlines()
            # The names of files: what is private of a region has none.
            return open_files() & of_the_pair, [line for line in maps if "region" in line]

        with forked(held) as child:
            assert child.result() == (set(), [])


def test_a_session_that_only_a_child_still_has_ends_with_its_parent(device: str) -> None:
    near, far = session_pair(device)
    with near, far:
        go_on, told = os.pipe()
        with forked(lambda: os.read(go_on, 1)) as child:
            near.sendall(b"last words")
            near.close()
            # The child has no copy of the connection that would keep it up.
            assert receive_all(far) == b"last words"
            os.write(told, b"x")
            child.result()
        os.close(go_on)
        os.close(told)


def test_a_child_connects_and_listens_anew(device: str) -> None:
    def in_child(address: tuple[str, int]) -> tuple[bytes, str, str, str]:
        with ivsmc.create_connection(address, device=device) as session:
            answer = question(session)
            transport = session.transport
        near, far = session_pair(device)
        with near, far:
            return answer, transport, near.transport, far.transport

    near, far = session_pair(device)
    with near, far, running(answer_questions, device, 2) as server:
        address = server.receive()
        smc = expected(device)
        with forked(in_child, address) as child:
            assert child.result() == (b"question", smc, smc, smc)
        with ivsmc.create_connection(address, device=device) as session:
            assert question(session) == b"question"
        server.receive()
        near.sendall(b"x")
        assert far.recv(1) == b"x"


def test_a_child_accepts_from_an_inherited_listener(device: str) -> None:
    def serve(listener: ivsmc.Listener) -> str:
        with listener, listener.accept()[0] as session:
            echo(session)
            return session.transport

    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        for _ in range(3):
            with forked(serve, listener) as child:
                with ivsmc.create_connection(listener.getsockname(), device=device) as session:
                    assert question(session) == b"question"
                    assert session.transport == child.result() == expected(device)
        # And the parent, once it is the only one again.
        echoing = threading.Thread(target=serve, args=(listener,))
        echoing.start()
        with ivsmc.create_connection(listener.getsockname(), device=device) as session:
            assert question(session) == b"question"
        echoing.join()


def test_a_parent_that_has_accepted_leaves_connections_to_its_child(device: str) -> None:
    def serve(listener: ivsmc.Listener) -> str:
        with listener, listener.accept()[0] as session:
            echo(session)
            return session.transport

    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        address = listener.getsockname()
        with ivsmc.create_connection(address, device=device), listener.accept()[0]:
            pass
        with forked(serve, listener) as child:
            with ivsmc.create_connection(address, device=device) as session:
                assert question(session) == b"question"
                assert child.result() == session.transport


def test_connect_then_accept_in_a_child(device: str) -> None:
    def in_child(listener: ivsmc.Listener) -> tuple[str, str]:
        with ivsmc.create_connection(listener.getsockname(), device=device) as near:
            with listener.accept()[0] as far:
                near.sendall(b"x")
                assert far.recv(1) == b"x"
                return near.transport, far.transport

    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        with forked(in_child, listener) as child:
            near, far = child.result()
        assert near == far


def test_a_child_of_a_child(device: str) -> None:
    def in_child() -> str:
        near, far = session_pair(device)
        with near, far:
            with forked(in_grandchild, near) as grandchild:
                result: str = grandchild.result()
            near.sendall(b"x")
            assert far.recv(1) == b"x"
            return result

    def in_grandchild(inherited: ivsmc.Session) -> str:
        with pytest.raises(ivsmc.ForkedSession):
            inherited.send(b"x")
        near, far = session_pair(device)
        with near, far:
            near.sendall(b"x")
            assert far.recv(1) == b"x"
            return near.transport

    with forked(in_child) as child:
        assert child.result() == expected(device)


def test_forking_while_threads_send_receive_and_connect(device: str) -> None:
    near, far = session_pair(device)
    total = 64 << 20
    stop = threading.Event()

    def in_child(address: tuple[str, int]) -> bytes:
        with ivsmc.create_connection(address, device=device) as session:
            return question(session)

    with near, far, running(answer_questions, device, None) as server:
        address = server.receive()

        def connect() -> None:
            while not stop.is_set():
                assert in_child(address) == b"question"

        threads = [
            threading.Thread(target=exchange, args=(near, 1, 2, total)),
            threading.Thread(target=exchange, args=(far, 2, 1, total)),
            threading.Thread(target=connect),
        ]
        for thread in threads:
            thread.start()
        children = 0
        while children < 20 or (threads[0].is_alive() and children < 100):
            with forked(in_child, address) as child:
                assert child.result() == b"question"
            children += 1
        stop.set()
        for thread in threads:
            thread.join()
        with socket.create_connection(address) as conn:
            assert question(conn, b"stop") == b"stop"
        server.receive()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(device: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    near, far = session_pair(device)
    with near, far, ivsmc.create_server(LOOPBACK, device=device) as listener:
        process = context.Process(  # type: ignore[attr-defined]  # of each concrete one
            target=ask, args=(listener.getsockname(), device)
        )
        process.start()
        with listener.accept()[0] as session:
            assert session.transport == expected(device)
            echo(session)
        process.join()
        assert process.exitcode == 0
        near.sendall(b"x")
        assert far.recv(1) == b"x"


def test_a_child_ends_as_any_program_does(device: str) -> None:
    program = textwrap.dedent(
        f"""
        import os, sys, warnings
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        import ivsmc
        listener = ivsmc.create_server(("127.0.0.1", 0), device={device!r})
        near = ivsmc.create_connection(listener.getsockname(), device={device!r})
        far, _ = listener.accept()
        child = os.fork()
        if child == 0:
            listener.close()
            sys.exit(7)  # with all that an interpreter does at its end
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 7
        near.sendall(b"x")
        assert far.recv(1) == b"x"
        near.close()
        assert far.recv(1) == b""
        far.close()
        listener.close()
        """
    )
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")


def test_a_device_handle_is_the_parents(shared_device: str) -> None:
    def in_child(device: ivsmc.Device) -> bool:
        with pytest.raises(ivsmc.ForkedSession):
            device.census()
        device.close()
        with ivsmc.open_device(shared_device) as own:
            return own.census()["live"] >= 2

    with ivsmc.open_device(shared_device) as device:
        with forked(in_child, device) as child:
            assert child.result()
        assert device.census()["live"] >= 1
