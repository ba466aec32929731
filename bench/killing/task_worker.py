"""A worker of asyncio: one task for each lane that connects, and one for each accepted session."""

import asyncio
import random
import socket
from collections.abc import Coroutine
from typing import Any, cast

import ivsmc.asyncio
from killing.board import LANES, Area, Doing, Lane, Stage
from killing.drivers import drive_in_tasks
from killing.ends import End, Program
from killing.worker import LOOPBACK, Worker


class TaskWorker(Worker):
    """An event loop in the only thread."""

    def live(self) -> None:
        """Listen, connect, accept, until it is over."""
        asyncio.run(self._guard(self._live()))

    async def _guard(self, job: Coroutine[Any, Any, None]) -> None:
        try:
            await job
        except asyncio.CancelledError:
            raise
        except BaseException:
            self.fail()

    async def _live(self) -> None:
        self._listener = self.listen()
        self._listener.setblocking(False)
        self._handlers: set[asyncio.Task[None]] = set()
        first = 2 * self.life.lanes
        self._pairs = [
            (self.area.lane(index), self.area.lane(index + 1))
            for index in range(first, LANES - 1, 2)
        ]
        self._free_pair = asyncio.Semaphore(len(self._pairs))
        acceptor = asyncio.create_task(self._guard(self._accept_all()))
        clients = [
            asyncio.create_task(self._guard(self._be_client(index)))
            for index in range(self.life.lanes)
        ]
        self.area.words[Area.STAGE] = Stage.RUNNING
        is_early = await self._either_readable(self._wake_read, self.wires.finish)
        self.is_stopping = True
        if is_early and self.life.kill:
            self.condemn_after(10 * self.life.kill.delay)
        await asyncio.gather(*clients)
        self.area.words[Area.STAGE] = Stage.NO_CLIENTS
        if not is_early:
            await self._either_readable(self.wires.leave, self.wires.leave)
        acceptor.cancel()
        await asyncio.gather(acceptor, return_exceptions=True)
        self.close(self._listener)
        await asyncio.gather(*self._handlers)

    async def _either_readable(self, first: int, second: int) -> bool:
        """Wait for one of two descriptors; return whether it was the first."""
        loop = asyncio.get_running_loop()
        readable: asyncio.Queue[int] = asyncio.Queue()
        for descriptor in (first, second):
            loop.add_reader(descriptor, readable.put_nowait, descriptor)
        try:
            return await readable.get() == first
        finally:
            for descriptor in (first, second):
                loop.remove_reader(descriptor)

    async def _be_client(self, index: int) -> None:
        chance = random.Random(f"client {self.world.seed} {self.number} {index}")
        lanes = self.clients[index]
        while not self.is_stopping:
            listener = self.find_listener(chance)
            if listener is None:
                await asyncio.sleep(0.001)
                continue
            options = self.connect_options(chance)
            key, record = self.new_session()
            lanes[0].begin(Doing.CONNECT)
            try:
                session = await ivsmc.asyncio.connect(LOOPBACK, listener[1], **options)
            except OSError as error:
                self.judge_refusal(error, listener, options)
                lanes[0].rest()
                continue
            lanes[0].step()
            with session:
                end = End(self.world, session, lanes[0], self.name)
                self.count(session, lanes[0])
                await self._play(end, [end.as_client(key, record, listener)], lanes)
            lanes[0].rest()

    async def _play(self, end: End, introduction: list[Program], lanes: tuple[Lane, Lane]) -> None:
        await drive_in_tasks(end, introduction, lanes)
        if not end.is_known:
            return
        await drive_in_tasks(end, end.programs(), lanes)
        await drive_in_tasks(end, [end.ending()], lanes)
        end.judge()
        lanes[0].begin(Doing.CLOSE)

    async def _accept_all(self) -> None:
        chance = random.Random(f"acceptor {self.world.seed} {self.number}")
        loop = asyncio.get_running_loop()
        while True:
            await self._free_pair.acquire()
            accepted, _ = await loop.sock_accept(cast(socket.socket, self._listener))
            session = cast(ivsmc.Session, accepted)
            handler = asyncio.create_task(self._guard(self._handle(session, self._pairs.pop())))
            self._handlers.add(handler)
            handler.add_done_callback(self._handlers.discard)
            if self.life.relistens and chance.random() < 0.05:
                # asyncio (CPython 3.11) may still watch the descriptor, where it was readable
                # before there was somebody to accept: done with that, it would take the next one
                # of the same number for the one that it watches.
                await asyncio.sleep(0)
                self.close(self._listener)
                self._listener = self.listen()
                self._listener.setblocking(False)

    async def _handle(self, session: ivsmc.Session, lanes: tuple[Lane, Lane]) -> None:
        with session:
            end = End(self.world, session, lanes[0], self.name)
            await self._play(end, [end.as_server()], lanes)
        lanes[0].rest()
        self._pairs.append(lanes)
        self._free_pair.release()
