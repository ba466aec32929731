"""``create_connection`` and ``create_server``: the standard library's shapes."""

import errno
import operator
import os
import socket
from typing import Any, Literal, TypeAlias

from ivsmc import _native
from ivsmc._fallback import log_once
from ivsmc._listener import Listener
from ivsmc._session import Session
from ivsmc._timeout import checked_timeout

__all__ = ["create_connection", "create_server"]

Address: TypeAlias = tuple[str | None, int]
Require: TypeAlias = Literal["smc"] | None

# The socket module's own mark for "not given": libraries pass it on by name.
_NOT_GIVEN: Any = socket._GLOBAL_DEFAULT_TIMEOUT  # type: ignore[attr-defined]


def create_connection(
    address: Address,
    timeout: float | None = _NOT_GIVEN,
    source_address: Address | None = None,
    *,
    all_errors: bool = False,
    device: str | None = None,
    require: Require = None,
    buffer: int | None = None,
) -> Session:
    """Connect to ``address`` (host, port) and return a ``Session``.

    As ``socket.create_connection``, with its loop over the host's addresses: ``timeout`` in
    seconds is for each of them and stays set on the session, ``all_errors`` raises an
    ``ExceptionGroup`` instead of the last error.

    ``device`` names the device to use, or several with commas (``DeviceError`` if one of them
    cannot be used); ``"none"`` is plain TCP; None takes ``IVSMC_DEVICE``, else what is found,
    and passes over what cannot be used. ``require="smc"`` raises ``SMCRequired`` instead
    of falling back to TCP. ``buffer`` is the size in bytes of the buffer the peer writes into
    (rounded up to a power of two, 16 KiB to 1 MiB).
    """
    host, port = address
    seconds = checked_timeout(socket.getdefaulttimeout() if timeout is _NOT_GIVEN else timeout)
    _check_require(require)
    failures: list[OSError] = []
    for family, target in _targets(host, port):
        try:
            if seconds == 0.0:
                # What a non-blocking socket's connect() says; there is no session to wait on.
                raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
            source = _resolve_source(source_address, family) if source_address else None
            handle = _native.connect(family, target, seconds, source, device, require, buffer)
        except OSError as error:
            failures.append(error)
            continue
        session = Session(handle)
        session.settimeout(seconds)
        log_once(session.fallback_reason, target[:2], "connected to")
        failures.clear()  # they hold this frame
        return session
    try:
        if not failures:
            raise OSError("getaddrinfo returns an empty list")
        if all_errors:
            raise ExceptionGroup("create_connection failed", failures)
        raise failures[-1]
    finally:
        failures.clear()  # they hold this frame


def create_server(
    address: Address | None = None,
    *,
    family: int = socket.AF_INET,
    backlog: int | None = None,
    reuse_port: bool = False,
    dualstack_ipv6: bool = False,
    device: str | None = None,
    require: Require = None,
    buffer: int | None = None,
    fd: int | None = None,
) -> Listener:
    """Listen on ``address`` (host, port) and return a ``Listener``.

    As ``socket.create_server``; ``device``, ``require`` and ``buffer`` as in
    ``create_connection``. ``fd`` adopts a TCP socket that listens already (systemd's socket
    activation, a parent's): give no address then; the listener owns the descriptor.
    """
    _check_require(require)
    if backlog is None:
        backlog = min(socket.SOMAXCONN, 128)
    if fd is not None:
        if address is not None:
            raise ValueError("create_server: give an address or fd, not both")
        listening = _adopt(fd)
    elif address is None:
        raise TypeError("create_server: address or fd is needed")
    else:
        listening = socket.create_server(
            address,
            family=family,
            backlog=backlog,
            reuse_port=reuse_port,
            dualstack_ipv6=dualstack_ipv6,
        )
    shared = reuse_port or fd is not None
    acceptor = _native.Acceptor(listening.detach(), backlog, shared, device, require, buffer)
    return Listener(acceptor)


def _targets(host: Any, port: Any) -> list[tuple[int, Any]]:
    """Return the addresses of ``host`` to try, with their families.

    A dotted quad is its own address; asking the resolver costs a tenth of a connect.
    """
    if isinstance(host, str) and type(port) is int and 0 <= port <= 0xFFFF:
        try:
            socket.inet_pton(socket.AF_INET, host)
        except OSError:  # a name, or IPv6
            pass
        else:
            return [(socket.AF_INET, (host, port))]
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)
    return [(family, target) for family, _, _, _, target in found]


def _resolve_source(source: Address, family: int) -> Any:
    """Return ``source`` as a numeric address of ``family``; no host is any address."""
    host, port = source[:2]
    if operator.index(port) not in range(0x10000):  # getaddrinfo would cut it off
        raise OverflowError("source_address: port must be 0-65535.")
    found = socket.getaddrinfo(host or None, port, family, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    return found[0][4]


def _adopt(fd: int) -> socket.socket:
    """Return ``fd`` as a socket, or raise and leave it to the caller."""
    sock = socket.socket(fileno=fd)
    if (
        sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type == socket.SOCK_STREAM
        and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        return sock
    found = repr(sock)
    sock.detach()
    raise ValueError(f"create_server: fd {fd} is not a listening TCP socket: {found}")


def _check_require(require: str | None) -> None:
    if require not in (None, "smc"):
        raise ValueError(f"require must be None or 'smc', not {require!r}")
