"""asyncio's ``sock=`` hooks and socket calls take sessions and listeners."""

import asyncio
import contextlib
import os
from typing import Any

import pytest

import ivsmc
import ivsmc.asyncio
from endpoints import LOOPBACK

SIZE = 3 * 1024 * 1024


async def connected(address: tuple[str, int], device: str) -> ivsmc.Session:
    session = await asyncio.to_thread(ivsmc.create_connection, address, device=device)
    session.setblocking(False)
    return session


class Echo:
    """What a server does with each client, counted when it is done."""

    def __init__(self) -> None:
        self.served = asyncio.Semaphore(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.served.release()


async def echoed(
    content: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bytes:
    """Send ``content`` and the end, receive what comes back meanwhile, and close."""

    async def send() -> None:
        writer.write(content)
        await writer.drain()
        writer.write_eof()

    _, received = await asyncio.gather(send(), reader.read(-1))
    writer.close()
    await writer.wait_closed()
    return received


def test_streams(device: str) -> None:
    content = os.urandom(SIZE)

    async def main() -> bytes:
        listener = ivsmc.create_server(LOOPBACK, device=device)
        address = listener.getsockname()
        listener.setblocking(False)
        echo = Echo()
        async with await asyncio.start_server(echo.serve, sock=listener):
            session = await connected(address, device)
            reader, writer = await asyncio.open_connection(sock=session)
            assert writer.get_extra_info("peername") == address
            received = await echoed(content, reader, writer)
            await echo.served.acquire()
            return received

    assert asyncio.run(main()) == content


def test_socket_calls_of_the_loop(device: str) -> None:
    content = os.urandom(SIZE)

    async def main() -> bytes:
        loop = asyncio.get_running_loop()
        with ivsmc.create_server(LOOPBACK, device=device) as listener:
            address = listener.getsockname()
            listener.setblocking(False)
            # The loop's stubs know socket.socket only; what they are given is its duck.
            near: Any = await connected(address, device)
            accepting: Any = listener
            far, _ = await loop.sock_accept(accepting)
        with near, far:

            async def receive() -> bytes:
                received = bytearray(SIZE)
                view, got = memoryview(received), 0
                while got < SIZE:
                    got += await loop.sock_recv_into(far, view[got:])
                return bytes(received)

            _, received = await asyncio.gather(loop.sock_sendall(near, content), receive())
            return received

    assert asyncio.run(main()) == content


@pytest.mark.parametrize("clients", [20])
def test_many_clients_of_one_server(device: str, clients: int) -> None:
    async def ask(address: tuple[str, int], number: int) -> bytes:
        session = await connected(address, device)
        reader, writer = await asyncio.open_connection(sock=session)
        writer.write(b"%d\n" % number)
        answer = await reader.readline()
        writer.close()
        await writer.wait_closed()
        return answer

    async def main() -> list[bytes]:
        listener = ivsmc.create_server(LOOPBACK, device=device)
        address = listener.getsockname()
        echo = Echo()
        async with await asyncio.start_server(echo.serve, sock=listener):
            answers = await asyncio.gather(*(ask(address, n) for n in range(clients)))
            for _ in answers:
                await echo.served.acquire()
            return answers

    assert asyncio.run(main()) == [b"%d\n" % number for number in range(clients)]


def test_streams_of_our_own(device: str) -> None:
    content = os.urandom(SIZE)

    async def main() -> bytes:
        echo = Echo()
        server = await ivsmc.asyncio.start_server(echo.serve, "127.0.0.1", device=device)
        async with server:
            host, port = server.sockets[0].getsockname()
            assert f"laddr=('{host}', {port})" in repr(server)
            session = await ivsmc.asyncio.connect(host, port, device=device)
            assert session.transport == ("tcp" if device == "none" else "smc")
            session.close()
            await echo.served.acquire()
            reader, writer = await ivsmc.asyncio.open_connection(host, port, device=device)
            received = await echoed(content, reader, writer)
            await echo.served.acquire()
            return received

    assert asyncio.run(main()) == content


def test_a_cancelled_connect_leaves_nothing(device: str) -> None:
    async def main() -> None:
        with ivsmc.create_server(LOOPBACK, device=device) as listener:
            host, port = listener.getsockname()
            connecting = asyncio.create_task(ivsmc.asyncio.connect(host, port, device=device))
            await asyncio.sleep(0)
            connecting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await connecting
            session, _ = await asyncio.to_thread(listener.accept)
            with session:
                assert await asyncio.to_thread(session.recv, 1) == b""

    asyncio.run(main())
