"""A worker of threads: one for each lane that connects, and one for each accepted session."""

import contextlib
import functools
import random
import select
import threading
from typing import Any

import ivsmc
from killing.board import LANES, Area, Doing, Lane, Stage
from killing.drivers import drive_by_readiness, drive_in_threads
from killing.ends import End, Program
from killing.worker import LOOPBACK, Worker


class ThreadWorker(Worker):
    """A thread for each lane and each session."""

    def live(self) -> None:
        """Listen, connect, accept, until it is over."""
        self._listener = self.listen()
        self._closing = threading.Lock()
        self._handlers: set[threading.Thread] = set()
        first = 2 * self.life.lanes
        self._pairs = [
            (self.area.lane(index), self.area.lane(index + 1)) for index in range(first, LANES, 2)
        ]
        self._free_pair = threading.Semaphore(len(self._pairs))
        self._acceptor = threading.Thread(target=self.guarded, args=(self._accept_all,))
        self._acceptor.start()
        clients = [
            threading.Thread(target=self.guarded, args=(self._be_client, index))
            for index in range(self.life.lanes)
        ]
        for client in clients:
            client.start()
        self.area.words[Area.STAGE] = Stage.RUNNING
        ready, _, _ = select.select([self._wake_read, self.wires.finish], [], [])
        self.is_stopping = True
        is_early = self._wake_read in ready
        if is_early and self.life.kill:
            self.condemn_after(10 * self.life.kill.delay)
        for client in clients:
            client.join()
        self.area.words[Area.STAGE] = Stage.NO_CLIENTS
        if not is_early:
            select.select([self.wires.leave], [], [])
        with self._closing:
            self.close(self._listener)
        self._acceptor.join()
        for handler in list(self._handlers):
            handler.join()

    def _be_client(self, index: int) -> None:
        chance = random.Random(f"client {self.world.seed} {self.number} {index}")
        lanes = self.clients[index]
        while not self.is_stopping:
            listener = self.find_listener(chance)
            if listener is None:
                select.select([], [], [], 0.001)
                continue
            options = self.connect_options(chance)
            key, record = self.new_session()
            lanes[0].begin(Doing.CONNECT)
            try:
                session = ivsmc.create_connection((LOOPBACK, listener[1]), **options)
            except OSError as error:
                self.judge_refusal(error, listener, options)
                lanes[0].rest()
                continue
            lanes[0].step()
            with session:
                end = End(self.world, session, lanes[0], self.name)
                self.count(session, lanes[0])
                self._play(end, [end.as_client(key, record, listener)], lanes, chance)
            lanes[0].rest()

    def _play(
        self,
        end: End,
        introduction: list[Program],
        lanes: tuple[Lane, Lane],
        chance: random.Random,
    ) -> None:
        drive: Any = drive_by_readiness
        if chance.random() < 0.6:
            drive = functools.partial(drive_in_threads, run=self.guarded)
        drive(end, introduction, lanes, chance)
        if not end.is_known:
            return
        drive(end, end.programs(), lanes, chance)
        drive(end, [end.ending()], lanes, chance)
        end.judge()
        lanes[0].begin(Doing.CLOSE)

    def _accept_all(self) -> None:
        chance = random.Random(f"acceptor {self.world.seed} {self.number}")
        timeout = chance.choice((None, 0.02, 0))
        while True:
            self._free_pair.acquire()
            session = self._accept(timeout)
            if session is None:
                return
            lanes = self._pairs.pop()
            handler = threading.Thread(
                target=self.guarded, args=(self._handle, session, lanes, chance.random())
            )
            self._handlers.add(handler)
            handler.start()
            if self.life.relistens and chance.random() < 0.05:
                with self._closing:
                    if self._listener.closed:
                        return
                    self.close(self._listener)
                    self._listener = self.listen()

    def _accept(self, timeout: float | None) -> ivsmc.Session | None:
        """Return the next session; None when the listener is closed."""
        listener = self._listener
        listener.settimeout(timeout)
        while not listener.closed:
            try:
                return listener.accept()[0]
            except TimeoutError:
                pass
            except BlockingIOError:
                poller = select.poll()
                with contextlib.suppress(OSError, ValueError):
                    poller.register(listener, select.POLLIN)
                    poller.poll(20)
            except OSError:
                if not listener.closed:
                    raise
        return None

    def _handle(self, session: ivsmc.Session, lanes: tuple[Lane, Lane], seed: float) -> None:
        chance = random.Random(seed)
        with session:
            end = End(self.world, session, lanes[0], self.name)
            self._play(end, [end.as_server()], lanes, chance)
        lanes[0].rest()
        self._pairs.append(lanes)
        self._free_pair.release()
        self._handlers.discard(threading.current_thread())
