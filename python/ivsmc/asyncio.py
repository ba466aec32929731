"""Sessions for asyncio: ``open_connection`` and ``start_server`` of its streams, over ivsmc.

What they return are asyncio's own streams and server; only what carries the bytes is a session::

    import ivsmc.asyncio

    reader, writer = await ivsmc.asyncio.open_connection("host", 9000)
    server = await ivsmc.asyncio.start_server(serve, "", 9000)

The event loop must be one that takes any socket object with ``sock=``: asyncio's own selector
loop does; uvloop does its own I/O on the descriptor and must not be used.
"""

import asyncio
import functools
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast

from ivsmc._connect import create_connection, create_server
from ivsmc._session import Session

__all__ = ["connect", "open_connection", "start_server"]

_LIMIT = 64 * 1024
"""Bytes a reader buffers before it stops reading; asyncio's own default."""


async def connect(
    host: str | None,
    port: int,
    *,
    timeout: float | None = None,
    source_address: tuple[str, int] | None = None,
    device: str | None = None,
    require: Literal["smc"] | None = None,
    buffer: int | None = None,
) -> Session:
    """Connect as ``ivsmc.create_connection`` does, in a thread; return a non-blocking session.

    It is for ``sock=`` of the loop's own functions, such as ``loop.create_connection``. When the
    task is cancelled the connection is closed as soon as its set-up ends (``timeout`` bounds that).
    """
    loop = asyncio.get_running_loop()
    connecting = loop.run_in_executor(
        None,
        functools.partial(
            create_connection,
            (host, port),
            timeout,
            source_address,
            device=device,
            require=require,
            buffer=buffer,
        ),
    )
    try:
        session = await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close_result)
        raise
    session.setblocking(False)
    return session


async def open_connection(
    host: str | None,
    port: int,
    *,
    limit: int = _LIMIT,
    timeout: float | None = None,
    source_address: tuple[str, int] | None = None,
    device: str | None = None,
    require: Literal["smc"] | None = None,
    buffer: int | None = None,
    **options: Any,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect and return the streams, as ``asyncio.open_connection``.

    ``options`` go on to it: ``ssl`` with ``server_hostname``, for instance. Where the session
    itself is wanted, as for its ``fallback_reason``, give that of ``connect`` to asyncio's own
    ``open_connection(sock=session)``.
    """
    session = await connect(
        host,
        port,
        timeout=timeout,
        source_address=source_address,
        device=device,
        require=require,
        buffer=buffer,
    )
    try:
        return await asyncio.open_connection(
            sock=cast(socket.socket, session), limit=limit, **options
        )
    except BaseException:
        session.close()
        raise


async def start_server(
    client_connected_cb: Callable[
        [asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None
    ],
    host: str = "",
    port: int = 0,
    *,
    limit: int = _LIMIT,
    backlog: int = 100,
    reuse_port: bool = False,
    device: str | None = None,
    require: Literal["smc"] | None = None,
    buffer: int | None = None,
    **options: Any,
) -> asyncio.Server:
    """Listen and call ``client_connected_cb`` for each client, as ``asyncio.start_server``.

    ``host`` and ``port`` are those of ``ivsmc.create_server``: one numeric address or name, "" for
    all of IPv4. ``options`` go on to asyncio: ``ssl``, ``start_serving``.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = create_server(
        (host, port),
        family=family,
        backlog=backlog,
        reuse_port=reuse_port,
        device=device,
        require=require,
        buffer=buffer,
    )
    listener.setblocking(False)
    try:
        return await asyncio.start_server(
            client_connected_cb,
            sock=cast(socket.socket, listener),
            limit=limit,
            backlog=backlog,
            **options,
        )
    except BaseException:
        listener.close()
        raise


def _close_result(connecting: "asyncio.Future[Session]") -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()
