"""One end knows nothing of ivsmc: it gets plain TCP, at once, and not one byte more or less."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext

import pytest

import ivsmc
from endpoints import LOOPBACK, hasty, receive_all, receive_exactly
from listening import echo, listen, question
from processes import running

GREETING = b"220 ready\r\n"
BEGINS_AS_CLC = bytes.fromhex("e2d4c3d9 01 00e0 26") + bytes(216)
"""The header of a Proposal and as much as it announces, but no Proposal."""


def assert_plain(session: ivsmc.Session, name: str, side: str = "peer") -> None:
    reason = session.fallback_reason
    assert reason is not None
    assert (session.transport, reason.name, reason.side) == ("tcp", name, side)


def reason_of_listener(device: str) -> tuple[str, str]:
    return ("DISABLED", "local") if device == "none" else ("PLAIN_CLIENT", "peer")


@pytest.mark.parametrize("way", ["accept", "fileno", "inside"])
def test_a_plain_client_is_greeted_before_it_has_said_anything(device: str, way: str) -> None:
    """Whoever takes the connection: accept, the background, a thread that is waiting."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:

        def serve() -> None:
            session, _ = listener.accept()
            with session:
                assert_plain(session, *reason_of_listener(device))
                session.sendall(GREETING)
                echo(session)

        if way == "fileno":
            listener.fileno()
        thread = threading.Thread(target=serve)
        if way == "inside":
            thread.start()
        with socket.create_connection(listener.getsockname()) as client:
            if way != "inside":
                thread.start()
            assert receive_exactly(client, len(GREETING)) == GREETING
            assert question(client) == b"question"
        thread.join()
        expected = {"accepted_smc": 0, "accepted_tcp": 1, "handshakes": 0, "ready": 0}
        assert listener.stats() == expected


@pytest.mark.parametrize("first", [b"", b"x", BEGINS_AS_CLC[:3], BEGINS_AS_CLC])
def test_what_a_plain_client_sends_is_the_applications(device: str, first: bytes) -> None:
    """Also when it came before anybody accepted, and looks like SMC."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(first)
            session, _ = listener.accept()
            with session:
                assert_plain(session, *reason_of_listener(device))
                client.shutdown(socket.SHUT_WR)
                assert receive_all(session) == first
            assert receive_all(client) == b""


@pytest.mark.parametrize("greeting", [b"", GREETING, BEGINS_AS_CLC])
def test_a_plain_server(device: str, greeting: bytes) -> None:
    with socket.create_server(LOOPBACK) as listener:
        with ivsmc.create_connection(listener.getsockname(), device=device) as session:
            assert_plain(
                session, *(("DISABLED", "local") if device == "none" else ("PEER_NO_SMC", "peer"))
            )
            far, _ = listener.accept()
            with far:
                far.sendall(greeting)
                assert receive_exactly(session, len(greeting)) == greeting
                session.sendall(b"request")
                session.shutdown(socket.SHUT_WR)
                assert receive_all(far) == b"request"
            assert receive_all(session) == b""


def fastest(action: Callable[[], None]) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return min(seconds() for _ in range(30))


def test_nobody_waits_for_a_plain_end(shared_device: str) -> None:
    """A wait for somebody who never answers would be thousands of times longer."""
    with socket.create_server(LOOPBACK) as plain, ExitStack() as opened:
        listener = opened.enter_context(ivsmc.create_server(LOOPBACK, device=shared_device))

        def sockets() -> None:
            with socket.create_connection(plain.getsockname()) as near, plain.accept()[0] as far:
                far.sendall(b"x")
                near.recv(1)

        def plain_client() -> None:
            with socket.create_connection(listener.getsockname()) as near:
                with listener.accept()[0] as far:
                    far.sendall(b"x")
                    near.recv(1)

        def plain_server() -> None:
            with ivsmc.create_connection(plain.getsockname(), device=shared_device) as near:
                with plain.accept()[0] as far:
                    far.sendall(b"x")
                    near.recv(1)

        as_ever = fastest(sockets)
        assert fastest(plain_client) < 20 * as_ever
        assert fastest(plain_server) < 20 * as_ever


@pytest.mark.parametrize("greeting", [b"", GREETING])
@pytest.mark.parametrize("known", ["reaped", "not reaped", "not attached"])
def test_a_plain_server_on_the_port_of_a_killed_listener(
    shared_device: str, greeting: bytes, known: str
) -> None:
    """Whether or not this process knew the listener, and has seen that it is dead."""
    with ExitStack() as opened:
        device = None
        if known != "not attached":
            device = opened.enter_context(closing(ivsmc.open_device(shared_device)))
        with running(listen, LOOPBACK, {}, {"device": shared_device}) as server:
            address = server.receive()
            if device is not None:
                assert device.census()["listeners"] == 1
            server.kill()
        if shared_device.startswith("host:"):
            wait_for_the_verdict(shared_device)
        elif device is not None:
            assert device.census()["listeners"] == 1
            if known == "reaped":
                assert device.reap() == 1
                assert device.census()["listeners"] == 0
        with socket.create_server(address) as plain:
            session = opened.enter_context(ivsmc.create_connection(address, device=shared_device))
            assert_plain(session, "PEER_NO_SMC")
            if device is not None:
                assert device.census()["listeners"] == 0
            far, _ = plain.accept()
            with far:
                far.sendall(greeting)
                assert receive_exactly(session, len(greeting)) == greeting
                session.shutdown(socket.SHUT_WR)
                assert receive_all(far) == b""


def wait_for_the_verdict(device: str) -> None:
    """The ivshmem server alone says who is gone, a moment later."""
    with closing(ivsmc.open_device(device)) as opened:
        while opened.census()["listeners"]:
            opened.reap()


@pytest.mark.parametrize("greeting", [GREETING, BEGINS_AS_CLC, b""])
def test_a_plain_server_where_a_listener_should_be(shared_device: str, greeting: bytes) -> None:
    """The directory has a listener for every address of the port; this one is a plain server's."""
    with ivsmc.create_server(("", 0), reuse_port=True, device=shared_device) as listener:
        port = listener.getsockname()[1]
        with socket.create_server(("127.0.0.2", port), reuse_port=True) as plain:
            heard: list[bytes] = []

            def serve() -> None:
                far, _ = plain.accept()
                with far:
                    far.sendall(greeting)
                    heard.append(receive_all(far))

            thread = threading.Thread(target=serve)
            thread.start()
            address = plain.getsockname()
            briefly = nullcontext() if greeting else hasty()
            with briefly, ivsmc.create_connection(address, device=shared_device) as session:
                assert_plain(session, "PEER_SPOKE_FIRST" if greeting else "NOT_MATCHED")
                assert receive_exactly(session, len(greeting)) == greeting
                session.sendall(b"request")
            thread.join()
            assert heard == [b"request"]


def test_a_plain_server_that_ends_where_a_listener_should_be(shared_device: str) -> None:
    with ivsmc.create_server(("", 0), reuse_port=True, device=shared_device) as listener:
        port = listener.getsockname()[1]
        with socket.create_server(("127.0.0.2", port), reuse_port=True) as plain:
            thread = threading.Thread(target=lambda: plain.accept()[0].close())
            thread.start()
            address = plain.getsockname()
            with ivsmc.create_connection(address, device=shared_device) as session:
                assert_plain(session, "PEER_SPOKE_FIRST")
                assert session.recv(1) == b""
            thread.join()
