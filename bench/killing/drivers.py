"""Ways to perform the operations of an end's programs: what programs of users do with a session.

A step is counted when an operation has moved a byte or seen an end, not when a call returned: an
end that is woken for nothing over and over makes no step.
"""

import asyncio
import contextlib
import functools
import operator
import random
import select
import socket
import threading
from collections.abc import Callable
from typing import TypeAlias, cast

import ivsmc
from killing.board import Doing, Lane
from killing.ends import BreakOffError, End, Operation, Program

Perform: TypeAlias = Callable[[Operation], int | bytes]


def drive_in_threads(
    end: End,
    programs: list[Program],
    lanes: tuple[Lane, Lane],
    chance: random.Random,
    run: Callable[[Callable[[], None]], None],
) -> None:
    """Drive each program in a thread, in calls that wait, without or with a timeout.

    ``run`` calls what it is given and sees to what that raises.
    """
    seconds = chance.choice((None, None, 0.001, 0.05))
    end.session.settimeout(seconds)
    jobs = []
    for program, lane in zip(programs, lanes, strict=False):
        perform = functools.partial(
            _until_done, end.session, lane, random.Random(chance.random()), seconds is None
        )
        jobs.append(functools.partial(_drive, end, program, perform))
    helpers = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs[1:]]
    for helper in helpers:
        helper.start()
    jobs[0]()
    lanes[0].rest()
    for helper in helpers:
        helper.join()
        lanes[1].rest()


def _drive(end: End, program: Program, perform: Perform) -> None:
    try:
        operation = next(program)
        while True:
            try:
                result = perform(operation)
            except ivsmc.exceptions.PeerMisbehaved:
                raise
            except ConnectionError as error:
                operation = program.throw(error)
            else:
                operation = program.send(result)
    except StopIteration:
        pass
    except BreakOffError:
        end.session.close()  # the other thread may be inside
    except OSError:
        if not end.broke_off:
            raise


def _until_done(
    session: ivsmc.Session,
    lane: Lane,
    chance: random.Random,
    may_wait: bool,
    operation: Operation,
) -> int | bytes:
    lane.begin(Doing.SEND if operation.data else Doing.RECEIVE)
    while True:
        try:
            result = _once(session, chance, may_wait, operation)
        except TimeoutError:
            continue
        except ConnectionError:
            lane.step()
            raise
        lane.step()
        return result


def _once(
    session: ivsmc.Session, chance: random.Random, may_wait: bool, operation: Operation
) -> int | bytes:
    """One of the ways to send or to receive; those that wait for all only if they may."""
    data, size = operation.data, operation.size
    way = chance.randrange(4 if may_wait else 3)
    if data:
        match way:
            case 0:
                return session.send(data)
            case 1:
                middle = len(data) // 2
                return session.sendmsg([data[:middle], memoryview(data)[middle:]])
            case 2:
                return session.send(memoryview(data))
            case _:
                session.sendall(data)
                return len(data)
    match way:
        case 0:
            return session.recv(size)
        case 1:
            buffer = bytearray(size)
            return bytes(buffer[: session.recv_into(buffer)])
        case 2:
            seen = session.recv(size, socket.MSG_PEEK)
            received = session.recv(len(seen))
            if received != seen:
                raise RuntimeError("received is something else than was peeked at")
            return received
        case _:
            return session.recv(size, socket.MSG_WAITALL)


def drive_by_readiness(
    end: End, programs: list[Program], lanes: tuple[Lane, Lane], chance: random.Random
) -> None:
    """Drive all programs in one thread, without waiting in a call; poll waits."""
    end.session.setblocking(False)
    poller = select.poll()
    with contextlib.suppress(BreakOffError):
        todo = {program: next(program, None) for program in programs}
        while any(todo.values()):
            moved = False
            for program, operation in todo.items():
                if operation is None:
                    continue
                lanes[0].begin(Doing.SEND if operation.data else Doing.RECEIVE)
                with contextlib.suppress(BlockingIOError):
                    todo[program] = _perform_now(end.session, program, operation, chance)
                    lanes[0].step()
                    moved = True
            if not moved:
                left = [operation for operation in todo.values() if operation]
                events = [select.POLLOUT if each.data else select.POLLIN for each in left]
                poller.register(end.session.fileno(), functools.reduce(operator.or_, events))
                poller.poll()


def _perform_now(
    session: ivsmc.Session, program: Program, operation: Operation, chance: random.Random
) -> Operation | None:
    """Perform an operation; return the next one, None if there is none."""
    try:
        result = _once(session, chance, False, operation)
    except ivsmc.exceptions.PeerMisbehaved:
        raise
    except ConnectionError as error:
        broken: ConnectionError = error
    else:
        return _next(lambda: program.send(result))
    return _next(lambda: program.throw(broken))


def _next(step: Callable[[], Operation]) -> Operation | None:
    try:
        return step()
    except StopIteration:
        return None


async def drive_in_tasks(end: End, programs: list[Program], lanes: tuple[Lane, Lane]) -> None:
    """Drive each program in a task, with the event loop's own functions for sockets."""
    end.session.setblocking(False)
    tasks = [
        asyncio.ensure_future(_drive_task(end.session, program, lane))
        for program, lane in zip(programs, lanes, strict=False)
    ]
    try:
        await asyncio.gather(*tasks)
    except BreakOffError:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for lane in lanes:
        lane.rest()


async def _drive_task(session: ivsmc.Session, program: Program, lane: Lane) -> None:
    loop = asyncio.get_running_loop()
    sock = cast(socket.socket, session)
    operation = next(program, None)
    while operation:
        result: int | bytes
        lane.begin(Doing.SEND if operation.data else Doing.RECEIVE)
        try:
            if operation.data:
                await loop.sock_sendall(sock, operation.data)
                result = len(operation.data)
            else:
                result = await loop.sock_recv(sock, operation.size)
        except ivsmc.exceptions.PeerMisbehaved:
            raise
        except ConnectionError as error:
            broken: ConnectionError = error
            operation = _next(functools.partial(program.throw, broken))
        else:
            operation = _next(functools.partial(program.send, result))
        lane.step()
