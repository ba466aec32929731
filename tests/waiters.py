"""What a process does that is interrupted while it waits."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import ivsmc
from endpoints import LOOPBACK, Endpoint, fill, receive_all, receive_exactly, session_pair
from processes import Here

Call: TypeAlias = Callable[[Endpoint], Any]

RECEIVING: dict[str, Call] = {
    "recv": lambda end: end.recv(1),
    "recv with a timeout": lambda end: _with_timeout(end, lambda: end.recv(1)),
    "recv and peek": lambda end: end.recv(1, socket.MSG_PEEK),
    "recv_into": lambda end: end.recv_into(bytearray(1)),
    "recvmsg": lambda end: end.recvmsg(1),
    "recvmsg_into": lambda end: end.recvmsg_into([bytearray(1)]),
    "a file's read": lambda end: end.makefile("rb").read(1),
    "a file's readline": lambda end: end.makefile("r").readline(),
}
_SENDING: dict[str, Call] = {
    "send": lambda end: end.send(b"s"),
    "send with a timeout": lambda end: _with_timeout(end, lambda: end.send(b"s")),
    "sendall": lambda end: end.sendall(bytes(1 << 20)),
    "sendmsg": lambda end: end.sendmsg([b"s", b"s"]),
    "a file's flush": lambda end: _write_and_flush(end),
}
LONG = 1000
"""Seconds no test takes."""


def _until_it_fails(call: Call) -> Call:
    """``call`` again and again: into a full TCP connection the kernel lets one go through, late."""

    def calls(end: Endpoint) -> None:
        while True:
            call(end)

    return calls


SENDING = {name: _until_it_fails(call) for name, call in _SENDING.items()}
"""What waits while there is no room."""


def _with_timeout(end: Endpoint, call: Callable[[], Any]) -> None:
    end.settimeout(LONG)
    call()


def _write_and_flush(end: Endpoint) -> None:
    file = end.makefile("wb", buffering=0)
    file.write(b"s")


def receive_interrupted(here: Here, device: str, name: str) -> None:
    """Be interrupted while receiving; then receive what comes."""
    near, far = session_pair(device)
    with near, far:
        _be_interrupted(here, lambda: RECEIVING[name](near))
        near.settimeout(None)
        far.sendall(b"all of it")
        assert receive_exactly(near, 9) == b"all of it"
        near.sendall(b"and back")
        assert receive_exactly(far, 8) == b"and back"


def receive_all_interrupted(here: Here, device: str, flags: int) -> None:
    """Be interrupted while a part of what is asked for has come."""
    near, far = session_pair(device)
    with near, far:
        far.sendall(b"part")
        _be_interrupted(here, lambda: near.recv(5, flags | socket.MSG_WAITALL))
        far.sendall(b"more")
        if flags & socket.MSG_PEEK:
            assert receive_exactly(near, 8) == b"partmore"
        else:  # what the call had taken is lost, as on a socket
            assert receive_exactly(near, 4) == b"more"


def send_interrupted(here: Here, device: str, name: str) -> None:
    """Be interrupted while there is no room; then all that was sent arrives, and what follows."""
    near, far = session_pair(device)
    with near, far:
        filled = fill(near)
        near.setblocking(True)
        _be_interrupted(here, lambda: SENDING[name](near))
        near.setblocking(False)
        if near.transport == "smc":
            assert near.stats()["bytes_sent"] == filled
        part = far.recv(65536)
        arrived = len(part)
        near.setblocking(True)
        while arrived < filled:
            arrived += len(far.recv(65536))
        near.sendall(b"after it")
        near.shutdown(socket.SHUT_WR)
        rest = receive_all(far)
        assert rest.endswith(b"after it")
        if near.transport == "smc" and name != "sendall":
            assert (arrived - filled) + len(rest) == len(b"after it")
        far.sendall(b"and back")
        assert receive_exactly(near, 8) == b"and back"


def accept_interrupted(here: Here, device: str, timeout: float | None) -> None:
    """Be interrupted in accept; then accept."""
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        listener.settimeout(timeout)
        _be_interrupted(here, listener.accept)
        with ivsmc.create_connection(listener.getsockname(), device=device) as near:
            far, _ = listener.accept()
            with far:
                near.sendall(b"works")
                assert receive_exactly(far, 5) == b"works"
                assert near.transport == far.transport


@contextlib.contextmanager
def full_queue(listener: Any) -> Iterator[None]:
    """Fill the queue of a listener of backlog 0, so that whoever connects waits."""
    with contextlib.ExitStack() as clients:
        while True:
            client = clients.enter_context(socket.socket())
            # In loopback it connects at once, or not at all.
            client.settimeout(0.1)
            try:
                client.connect(listener.getsockname())
            except TimeoutError:
                break
        yield


def hold_a_full_queue(here: Here, device: str) -> None:
    """Listen, with a full queue, until the test says something."""
    with ivsmc.create_server(LOOPBACK, device=device, backlog=0) as listener:
        with full_queue(listener):
            here.send(listener.getsockname())
            here.receive()


def connect_interrupted(
    here: Here, device: str, address: tuple[str, int], timeout: float | None
) -> None:
    """Be interrupted while the queue of ``address`` is full; then connect elsewhere."""
    _be_interrupted(here, lambda: ivsmc.create_connection(address, timeout, device=device))
    near, far = session_pair(device)
    near.close()
    far.close()
    if device != "none":
        with ivsmc.open_device(device) as region:
            assert region.census()["intents"] == 0


def handshake_interrupted(here: Here, device: str, address: tuple[str, int]) -> None:
    """Be interrupted while the listener at ``address`` does not accept, or just after."""

    def connect_and_receive() -> None:
        with ivsmc.create_connection(address, device=device) as session:
            assert session.transport == "tcp"
            session.recv(1)

    _be_interrupted(here, connect_and_receive)
    with ivsmc.open_device(device) as region:
        assert region.census()["intents"] == 0


def _be_interrupted(here: Here, call: Callable[[], Any]) -> None:
    here.send("waiting")
    try:
        found = call()
    except KeyboardInterrupt:
        return
    raise AssertionError(f"not interrupted: {found!r}")
