"""What the other ends do in the tests of setting up and falling back."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import ivsmc
from endpoints import Endpoint, receive_all
from processes import Here


def listen(
    here: Here, address: tuple[str, int], environment: dict[str, str], arguments: dict[str, Any]
) -> None:
    """Listen on ``address``, say where, and accept as told, in a process with ``environment``.

    ``accept`` serves one session with ``echo``, ``hold`` keeps it open; both say its fallback
    reason. None is the end. Where ``SMCRequired`` is raised, its text is said instead.
    """
    os.environ.update(environment)
    with ExitStack() as opened:
        try:
            listener = opened.enter_context(ivsmc.create_server(address, **arguments))
        except ivsmc.SMCRequired as error:
            here.send(str(error))
            return
        here.send(listener.getsockname())
        while command := here.receive():
            try:
                session, _ = listener.accept()
            except ivsmc.SMCRequired as error:
                here.send(str(error))
                continue
            opened.enter_context(session)
            here.send(session.fallback_reason)
            if command == "accept":
                echo(session)
                session.close()


def echo(stream: Endpoint) -> None:
    """Receive until the stream ends, and send all of it back."""
    stream.sendall(receive_all(stream))


def question(stream: Endpoint, text: bytes = b"question") -> bytes:
    """What comes back when ``text`` and the end of the stream are sent."""
    stream.sendall(text)
    stream.shutdown(socket.SHUT_WR)
    return receive_all(stream)


@contextmanager
def relay(listener: socket.socket, target: tuple[str, int]) -> Iterator[None]:
    """Pass what one connection to ``listener`` carries on to ``target``, as a NAT router would."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        try:
            near, _ = listener.accept()
        except OSError:
            return  # nobody came
        with near, socket.create_connection(target) as far:
            back = threading.Thread(target=pump, args=(far, near))
            back.start()
            pump(near, far)
            back.join()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
