"""A stream session: what ``socket.socket`` is for TCP, over shared memory or TCP.

The native ``Stream`` moves the bytes; this class adds what the standard library does in Python:
files made from the session and the close that waits for them, warnings, ``sendfile``.
"""

import errno
import socket
import warnings
from builtins import type as Class
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NoReturn, Self, cast

from ivsmc import _native
from ivsmc._fallback import FallbackReason

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["Session"]

_SENDFILE_BLOCK = 64 * 1024
"""Bytes read from the file at a time."""


class Session(_native.Stream):
    """One connected stream; made by ``create_connection`` and ``Listener.accept``.

    The stream-socket methods do what they do on a ``socket.socket``, with the same results and
    exceptions. One thread may send while another receives. Not to be done with a session:
    reading or writing its ``fileno()`` directly (it only tells readiness), urgent data
    (``MSG_OOB``), ``detach`` and ``dup``: they are refused by name.
    """

    # The standard library's SocketIO counts itself in and out with these two.
    _io_refs = 0
    _closed = False

    @property
    def family(self) -> socket.AddressFamily:
        """Address family of the TCP connection."""
        return socket.AddressFamily(super().family)

    @property
    def type(self) -> socket.SocketKind:
        """``SOCK_STREAM``."""
        return socket.SocketKind(super().type)

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called (files made from the session may still be open)."""
        return self._closed or super().closed

    @property
    def fallback_reason(  # type: ignore[override]  # the native object as the public class
        self,
    ) -> FallbackReason | None:
        """Why the session goes over TCP; None on shared memory."""
        native = super().fallback_reason
        if native is None:
            return None
        return FallbackReason(native.name, native.code, native.sentence, native.side)

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Return a file object on this session, as ``socket.makefile`` does.

        The session is really closed once it and all its files are.
        """
        # The standard library's own function: it needs recv_into, send and the counters above.
        return socket.socket.makefile(  # type: ignore[call-overload, no-any-return]
            cast(socket.socket, self),
            mode,
            buffering,
            encoding=encoding,
            errors=errors,
            newline=newline,
        )

    def close(self) -> None:
        """Close the session once no file made from it is open any more.

        Data already sent stays readable for the peer. Closing with data unread is a reset, as in
        TCP. A thread inside another call gets an error.
        """
        self._closed = True
        if self._io_refs <= 0:
            self._close()

    def _decref_socketios(self) -> None:
        if self._io_refs > 0:
            self._io_refs -= 1
        if self._closed:
            self.close()

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, None]:
        """Receive as ``recv``; the address of a stream's data is None, as on a TCP socket."""
        return self.recv(bufsize, flags), None

    def recvfrom_into(
        self, buffer: "WriteableBuffer", nbytes: int = 0, flags: int = 0
    ) -> tuple[int, None]:
        """Receive as ``recv_into``; the address is None, as on a TCP socket."""
        return self.recv_into(buffer, nbytes, flags), None

    def sendto(self, data: "ReadableBuffer", *flags_and_address: Any) -> int:
        """``sendto(data[, flags], address)``: send to the peer; a stream ignores the address."""
        match flags_and_address:
            case (_,):
                return self.send(data)
            case (int(flags), _):
                return self.send(data, flags)
        raise TypeError(
            f"sendto() takes 2 or 3 arguments ({len(flags_and_address) + 1} given): "
            "data[, flags], address"
        )

    def sendfile(self, file: BinaryIO, offset: int = 0, count: int | None = None) -> int:
        """Send ``file`` from ``offset`` until its end or ``count`` bytes; return bytes sent.

        The file's position is set behind the last byte sent, also when an error ends the call.
        """
        if "b" not in getattr(file, "mode", "b"):
            raise ValueError("file should be opened in binary mode")
        if count is not None:
            if not isinstance(count, int):
                raise TypeError(f"count must be a positive integer (got {count!r})")
            if count <= 0:
                raise ValueError(f"count must be a positive integer (got {count!r})")
        if self.gettimeout() == 0:
            raise ValueError("non-blocking sockets are not supported")
        if offset:
            file.seek(offset)
        sent = 0
        try:
            while count is None or sent < count:
                block = _SENDFILE_BLOCK if count is None else min(count - sent, _SENDFILE_BLOCK)
                data = memoryview(file.read(block))
                if not data:
                    break
                while data:
                    done = self.send(data)
                    sent += done
                    data = data[done:]
            return sent
        finally:
            if sent > 0 and hasattr(file, "seek"):
                file.seek(offset + sent)

    def detach(self) -> NoReturn:
        """Refused: a session is more than its descriptor."""
        raise OSError(
            errno.EOPNOTSUPP,
            "detach: a session has no descriptor that could live without it; keep the session",
        )

    def dup(self) -> NoReturn:
        """Refused: share the session between threads instead."""
        raise OSError(
            errno.EOPNOTSUPP, "dup: a session cannot be duplicated; share it between threads"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")

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
        state = " [closed]" if self.closed else ""
        parts = [f"transport={self.transport!r}"]
        reason = self.fallback_reason
        if reason is not None:
            parts.append(f"fallback_reason={reason.name}")
        for label, name in (("laddr", self.getsockname), ("raddr", self.getpeername)):
            try:
                parts.append(f"{label}={name()!r}")
            except OSError:  # closed, or the peer is gone: shown without, as a socket is
                continue
        return f"<ivsmc.{type(self).__name__}{state} {', '.join(parts)}>"

    def __del__(self) -> None:
        if not super().closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            self._close()
