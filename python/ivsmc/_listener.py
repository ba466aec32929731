"""A listening end: what a listening ``socket.socket`` is for TCP."""

import errno
import os
import socket
import warnings
from builtins import type as Class
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from ivsmc import _native
from ivsmc._fallback import log_once
from ivsmc._session import Session
from ivsmc._timeout import checked_timeout

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["Listener"]


class Listener:
    """Accepts sessions from ivsmc clients and plain TCP clients alike; see ``create_server``.

    A plain client gets plain TCP at once. Inherited listeners work after ``fork()``.
    """

    def __init__(self, acceptor: _native.Acceptor) -> None:
        self._acceptor = acceptor
        self._timeout = socket.getdefaulttimeout()

    def accept(self) -> tuple[Session, Any]:
        """Wait for a client; return its session and its address.

        Raises ``TimeoutError`` when the listener's timeout ends first and ``BlockingIOError``
        when it does not block; with ``require="smc"`` ``SMCRequired`` for a client that only
        speaks TCP (its connection is closed; accept again for the next).
        """
        handle, address = self._acceptor.accept(self._timeout)
        session = Session(handle)
        session.settimeout(socket.getdefaulttimeout())
        if self._timeout == 0.0:
            # An event loop may still forget this listener's descriptor after it was closed; made
            # later, the session's could get the same number, and be forgotten instead.
            session.fileno()
        # A client's port is always new.
        log_once(session.fallback_reason, address[0], "accepted from")
        return session, address

    def listen(self, backlog: int = 0, /) -> None:
        """Do nothing: it listens already, with the backlog it was made with.

        It is here because asyncio and others call it on every socket they serve.
        """

    @property
    def family(self) -> socket.AddressFamily:
        """``AF_INET`` or ``AF_INET6``."""
        return socket.AddressFamily(self._acceptor.family)

    @property
    def type(self) -> socket.SocketKind:
        """``SOCK_STREAM``."""
        return socket.SOCK_STREAM

    @property
    def proto(self) -> int:
        """``IPPROTO_TCP``."""
        return socket.IPPROTO_TCP

    @property
    def timeout(self) -> float | None:
        """Seconds ``accept`` waits; None: for ever, 0.0: not at all."""
        return self._timeout

    @property
    def closed(self) -> bool:
        """Whether the listener is closed."""
        return self._acceptor.closed

    def settimeout(self, value: float | None, /) -> None:
        """Set how many seconds ``accept`` waits; None: for ever, 0: not at all."""
        self._timeout = checked_timeout(value)

    def gettimeout(self) -> float | None:
        """Return the seconds ``accept`` waits."""
        return self._timeout

    def setblocking(self, flag: bool, /) -> None:
        """Wait for ever, or not at all."""
        self._timeout = None if flag else 0.0

    def getblocking(self) -> bool:
        """Whether ``accept`` waits."""
        return self._timeout != 0.0

    def fileno(self) -> int:
        """Return a descriptor that is readable while ``accept`` has a client; -1 when closed.

        It tells readiness and nothing else; from now on this process takes connections.
        """
        return self._acceptor.fileno()

    def getsockname(self) -> Any:
        """Return the address listened on."""
        return self._acceptor.getsockname()

    def getpeername(self) -> Any:
        """Raise ``OSError`` (``ENOTCONN``), as a listening socket does; asyncio shows it so."""
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    @overload
    def getsockopt(self, level: int, option: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, option: int, buflen: int, /) -> bytes: ...
    def getsockopt(self, level: int, option: int, buflen: int = 0, /) -> int | bytes:
        """Read an option of the listening TCP socket."""
        return self._acceptor.getsockopt(level, option, buflen)

    @overload
    def setsockopt(self, level: int, option: int, value: "int | ReadableBuffer", /) -> None: ...
    @overload
    def setsockopt(self, level: int, option: int, value: None, optlen: int, /) -> None: ...
    def setsockopt(self, *arguments: Any) -> None:
        """Set an option of the listening TCP socket."""
        self._acceptor.setsockopt(*arguments)

    def stats(self) -> dict[str, Any]:
        """Return counters: sessions accepted over each transport, waiting, refused."""
        return self._acceptor.stats()

    def close(self) -> None:
        """Stop listening. A thread inside ``accept`` gets an error; sessions live on."""
        self._acceptor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: Class[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<ivsmc.Listener [closed]>"
        return f"<ivsmc.Listener laddr={self.getsockname()!r}>"

    def __del__(self) -> None:
        acceptor = getattr(self, "_acceptor", None)
        if acceptor is not None and not acceptor.closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            acceptor.close()
