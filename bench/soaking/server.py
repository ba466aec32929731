"""The listening process: what clients ask for, in threads or in tasks."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import ivsmc
import ivsmc.asyncio
from soaking.members import Tally, Weight
from soaking.streams import ECHO, HEADER, STREAM, Wrong, exchange, receive_exactly

LOOPBACK = "127.0.0.1"
_BLOCK = 1 << 16
_PATIENCE = 60.0
"""Seconds until its threads must have seen their clients leave."""

Order = str
"""``address`` or ``weigh``."""


@contextlib.contextmanager
def threads(device: str) -> Iterator[Callable[[Order], object]]:
    """Serve with a thread for each session."""
    at_work: set[threading.Thread] = set()
    failures: list[BaseException] = []
    tally = Tally()

    def serve(session: ivsmc.Session) -> None:
        try:
            with session:
                tally.bytes += _answer(session)
                tally.sessions += 1
        except BaseException as error:
            failures.append(error)
        at_work.discard(threading.current_thread())

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed, at the end
            while True:
                session, _ = listener.accept()
                thread = threading.Thread(target=serve, args=(session,))
                at_work.add(thread)
                thread.start()

    def work(order: Order) -> object:
        if order == "address":
            return listener.getsockname()
        end = time.monotonic() + _PATIENCE
        while at_work and time.monotonic() < end:
            time.sleep(0.01)
        if failures:
            raise failures[0]
        if at_work:
            raise Wrong(f"{len(at_work)} sessions are still there, and no client has one")
        done = Tally(tally.sessions, 0, tally.bytes)
        tally.sessions = tally.bytes = 0
        return done, Weight.now()

    with ivsmc.create_server((LOOPBACK, 0), device=device) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield work
    accepting.join()


def _answer(session: ivsmc.Session) -> int:
    """Do what the client asks for; return the bytes checked."""
    what, seed, total = HEADER.unpack(receive_exactly(session.recv, HEADER.size))
    if what == STREAM:
        exchange(session, seed + 1, seed, total)
        return int(total)
    if what != ECHO:
        raise Wrong(f"a client asks for {what!r}")
    while data := session.recv(_BLOCK):
        session.sendall(data)
    return 0


@contextlib.contextmanager
def tasks(device: str) -> Iterator[Callable[[Order], object]]:
    """Serve echoes with a task for each session."""
    failures: list[BaseException] = []
    tally = Tally()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readexactly(HEADER.size)
            while data := await reader.read(_BLOCK):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()
            tally.sessions += 1
        except BaseException as error:
            failures.append(error)
            writer.close()

    async def listen() -> asyncio.Server:
        return await ivsmc.asyncio.start_server(serve, LOOPBACK, 0, device=device)

    def others() -> set["asyncio.Task[object]"]:
        async def look() -> set["asyncio.Task[object]"]:
            return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}

        return asyncio.run_coroutine_threadsafe(look(), loop).result()

    def work(order: Order) -> object:
        if order == "address":
            return server.sockets[0].getsockname()
        end = time.monotonic() + _PATIENCE
        while (left := others()) and time.monotonic() < end:
            time.sleep(0.01)
        if failures:
            raise failures[0]
        if left:
            raise Wrong(f"tasks are still there, and no client has a session: {left}")
        done = Tally(tally.sessions)
        tally.sessions = 0
        return done, Weight.now()

    loop = asyncio.new_event_loop()
    running = threading.Thread(target=loop.run_forever)
    running.start()
    server = asyncio.run_coroutine_threadsafe(listen(), loop).result()
    try:
        yield work
    finally:
        server.close()
        loop.call_soon_threadsafe(loop.stop)
        running.join()
        loop.close()
