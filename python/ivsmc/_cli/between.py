"""The bench between two processes started by hand, also on two machines.

One listens, the other connects and measures. Commands and their results go through the session
itself, and the plain TCP connection that it is compared with comes to the same port: one port is
all that a firewall must let through. All numbers are little-endian.

    listener -> client   the greeting
    client -> listener   a command: what, on which stream, microseconds to spin, two numbers
    listener -> client   its result, a number
"""

import contextlib
import os
import secrets
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any

import ivsmc
from ivsmc import _native
from ivsmc._cli import measure
from ivsmc._cli.arguments import shown
from ivsmc._cli.machine import Refused
from ivsmc._cli.measure import Stream
from ivsmc._cli.serving import stop_on_sigterm

__all__ = ["Far", "connected", "greeted", "listen"]

_GREETING = b"ivsmc bench 1\n"
_COMMAND = struct.Struct("<BBIQQ")
_RESULT = struct.Struct("<Q")
_NAMES = ("plain", *measure.COMMANDS)
"""What a command's first number means; ``plain``: a TCP connection follows, with this token."""
_AS_CONFIGURED = (1 << 32) - 1
"""Spin as the environment of the listening end says."""
_TOKEN_BYTES = 16
_PATIENCE = 60.0
"""Seconds a client may think between two commands."""
_SETUP_SECONDS = 10.0


class Far:
    """The other end as one stream to it: the session, or the plain connection beside it."""

    def __init__(self, session: ivsmc.Session, stream: Stream, spin: int | None) -> None:
        self._session = session
        self.stream = stream
        self.spin = spin
        """Microseconds to look before sleeping, at both ends; None: as configured at each."""

    def ask(self, name: str, *numbers: int) -> None:
        """Send a command."""
        _native.set_spin(self.spin)
        spin = _AS_CONFIGURED if self.spin is None else self.spin
        is_plain = self.stream is not self._session
        first, second = (*numbers, 0, 0)[:2]
        self._session.sendall(_COMMAND.pack(_NAMES.index(name), is_plain, spin, first, second))

    def answer(self) -> int:
        """Return the result of the command."""
        (result,) = _RESULT.unpack(_exactly(self._session, _RESULT.size))
        _native.set_spin(None)
        return int(result)


def greeted(session: ivsmc.Session) -> bool:
    """Whether the other end says that it is a bench; waits as long as the session's timeout."""
    try:
        return _exactly(session, len(_GREETING)) == _GREETING
    except OSError:
        return False


@contextlib.contextmanager
def connected(
    address: tuple[str, int], device: str | None, require: Any
) -> Iterator[tuple[ivsmc.Session, socket.socket]]:
    """Connect to a listening bench: a session, and a plain connection to the same port."""
    try:
        session = ivsmc.create_connection(address, _SETUP_SECONDS, device=device, require=require)
    except ConnectionRefusedError:
        raise Refused(
            f"{shown(address)}: nobody listens there; start there: "
            f"ivsmc bench --listen {address[1]}"
        ) from None
    with session:
        session.settimeout(_SETUP_SECONDS)
        if not greeted(session):
            raise Refused(
                f"{shown(address)} is no ivsmc bench --listen, or it serves somebody else"
            )
        token = secrets.token_bytes(_TOKEN_BYTES)
        far = Far(session, session, None)
        far.ask("plain", *struct.unpack("<QQ", token))
        with socket.create_connection(session.getpeername()[:2], _SETUP_SECONDS) as plain:
            plain.sendall(token)
            far.answer()
            for stream in (session, plain):
                stream.settimeout(None)
                measure.no_delay(stream)
            yield session, plain


def listen(address: tuple[str, int], device: str | None, require: Any) -> int:
    """Serve one client after the other until SIGINT or SIGTERM."""
    stop_on_sigterm()
    host = address[0]
    dualstack = not host and socket.has_dualstack_ipv6()
    with socket.create_server(
        address,
        family=socket.AF_INET6 if dualstack or ":" in host else socket.AF_INET,
        dualstack_ipv6=dualstack,
    ) as listening:
        _say(f"listening on {shown(listening.getsockname())}")
        try:
            while True:
                _serve_next(listening, device, require)
        except KeyboardInterrupt:
            return 0


def _serve_next(listening: socket.socket, device: str | None, require: Any) -> None:
    client = "a client"
    try:
        # Closed before the plain connection comes, which must be accepted as a plain one.
        with ivsmc.create_server(
            fd=os.dup(listening.fileno()),
            device=device,
            require=require,
        ) as listener:
            session, peer = listener.accept()
        client = shown(peer)
        with session:
            how = "shared memory" if session.transport == "smc" else str(session.fallback_reason)
            _say(f"{client} is here, over {how}")
            session.settimeout(_PATIENCE)
            measure.no_delay(session)
            session.sendall(_GREETING)
            _serve(session, listening)
        _say(f"{client} has gone")
    except (ivsmc.DeviceError, ivsmc.RegionError):
        raise  # there will be no other
    except OSError as error:
        _say(f"{client}: {error.strerror or error}")
    finally:
        _native.set_spin(None)


def _serve(session: ivsmc.Session, listening: socket.socket) -> None:
    """Carry out commands until the session ends."""
    with contextlib.ExitStack() as cleanup:
        streams: list[Stream] = [session]
        while True:
            command = session.recv(_COMMAND.size, socket.MSG_WAITALL)
            if not command:
                return
            if len(command) < _COMMAND.size:
                raise ConnectionError("the client stopped in the middle of a command")
            number, stream, spin, *numbers = _COMMAND.unpack(command)
            if number >= len(_NAMES) or stream >= len(streams):
                raise ConnectionError("the client asks for what this version does not know")
            if _NAMES[number] == "plain":
                plain = _plain(listening, struct.pack("<QQ", *numbers))
                streams[1:] = [cleanup.enter_context(plain)]
                result = 0
            else:
                name = _NAMES[number]
                numbers = numbers[: _ARITY[name]]
                if len(numbers) > 1 and numbers[1] not in _SIZES:
                    raise ConnectionError(f"the client asks for messages of {numbers[1]} bytes")
                _native.set_spin(None if spin == _AS_CONFIGURED else spin)
                session.settimeout(None)
                result = measure.COMMANDS[name](streams[stream], *numbers)
                session.settimeout(_PATIENCE)
                _native.set_spin(None)
            session.sendall(_RESULT.pack(result))


_ARITY = {"echo": 2, "sink": 2, "crc": 1}
"""How many numbers a command has; the second is the bytes of a message."""
_SIZES = range(1, (16 << 20) + 1)


def _plain(listening: socket.socket, token: bytes) -> socket.socket:
    """Accept the connection that starts with ``token``; others are closed."""
    listening.settimeout(_SETUP_SECONDS)
    try:
        while True:
            plain, _ = listening.accept()
            plain.settimeout(_SETUP_SECONDS)
            with contextlib.suppress(OSError):
                if plain.recv(_TOKEN_BYTES, socket.MSG_WAITALL) == token:
                    plain.settimeout(None)
                    measure.no_delay(plain)
                    return plain
            plain.close()
    finally:
        listening.settimeout(None)


def _exactly(session: ivsmc.Session, size: int) -> bytes:
    data = session.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError("the other end has gone; standard error there says why")
    return data


def _say(text: str) -> None:
    print(f"ivsmc bench: {text}", file=sys.stderr, flush=True)
