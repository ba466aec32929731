"""An ivshmem server that ends and goes on: its clients keep everything, and notice nothing.

``--restarts 1000`` for a long run.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ivsmc
from commands import IVSMC, command
from conftest import SHM
from crowd import PATIENCE
from doorbells import answered, ask, attend, warm_up
from processes import Remote, running
from restarting import (
    TRIES,
    KeptServer,
    answer,
    ask_until_told,
    come_and_go,
    kept_server,
    merge,
)
from told import Client, client

VECTORS = 2
TALKERS = 4
"""Processes that talk with one, which was there first; two of them come later."""


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="ivsmc-restart-", dir=SHM) as directory:
        yield Path(directory) / "ivs.sock"


def strike(server: KeptServer, chance: random.Random) -> None:
    """Kill the process that serves at some moment; most often while it serves."""
    if chance.random() < 0.75:
        server.until_started(server.starts())
        starts = server.starts()
        server.strike(chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)))
        server.until_started(starts + 1)
        time.sleep(chance.uniform(0, 0.05))
    else:
        time.sleep(chance.uniform(0, 0.3))
        server.strike(signal.SIGKILL)


def test_clients_notice_nothing(path: Path, request: pytest.FixtureRequest) -> None:
    """Streams that sleep on doorbells, newcomers, and one that dies while nobody serves."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    strikes = request.config.getoption("--restarts")
    device = f"host:{path}"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(kept_server(path, "--vectors", str(VECTORS)))
        # With the second one the keeper has heard all that the first one said.
        server.strike(signal.SIGKILL)
        server.until_started(2)
        before = server.descriptors()
        observer = stack.enter_context(client(path, PATIENCE))
        answering = stack.enter_context(running(answer, device, TALKERS))
        address = answering.receive()
        visitor = stack.enter_context(running(come_and_go, path))
        assert visitor.receive() == "comes"
        talkers: list[Remote] = []
        for number in range(strikes):
            if len(talkers) < 2 or number in (strikes // 3, 2 * strikes // 3):
                asking = running(ask_until_told, device, address, seed + number)
                talkers.append(stack.enter_context(asking))
                if number != 1:
                    assert talkers[-1].receive() == "asks"
            if number % 10 == 5:
                die_while_nobody_serves(server, device)
            strike(server, chance)
            observer.take_all()
        assert talkers[1].receive() == "asks"
        for talker in talkers:
            talker.send("end")
        for talker in talkers:
            rounds, has_doorbell, stats = talker.receive()
            print(rounds, has_doorbell, stats)
            assert rounds > strikes
            if has_doorbell:
                assert stats["doorbells_received"] > stats["sleeps"] / 2
                # What is not woken by doorbell is so at first, before one has come through.
                assert stats["wakes_received"] < rounds / 10 + 10
        assert len(answering.receive()) == TALKERS
        visitor.send("end")
        eventfds = visitor.receive()
        until_left_alone(server, observer, before)
        merge(eventfds, observer.eventfds)
        # Ids are given again: to as many as were there at once, or had just left.
        assert sorted(eventfds) == list(range(len(eventfds)))
        assert len(eventfds) <= TALKERS + 10
        with ivsmc.open_device(device) as region:
            region.reap()
            census = region.census()
            assert census == dict.fromkeys(census, 0) | {"live": 1}
    said = "".join(server.said)
    assert "may live" not in said
    assert "nobody keeps" not in said
    assert "turned away" not in said


def die_while_nobody_serves(server: KeptServer, device: str) -> None:
    """Its id is free again at once."""
    with running(attend, device) as victim:
        assert victim.receive() == "attached"
        who = f"(process {victim.process.pid},"
        server.until_said(who)
        with server.down():
            victim.kill()
        [joined] = [line for line in server.said if who in line]
        peer = joined.split("peer ")[1].split()[0]
        for _ in range(TRIES):
            if any(
                f"peer {peer} left" in line for line in server.said[server.said.index(joined) :]
            ):
                return
            time.sleep(0.001)
        raise AssertionError(server.said)


def until_left_alone(server: KeptServer, observer: Client, before: tuple[int, int]) -> None:
    """Wait until only the observer is there; keeper and server hold what it takes and no more."""
    observer.take_all()
    # Its connection, and the eventfds of all ids there ever were.
    more = 1 + VECTORS * len(observer.eventfds)
    for _ in range(TRIES):
        if server.descriptors() == (before[0] + more, before[1] + more):
            break
        time.sleep(0.001)
        observer.take_all()
        more = 1 + VECTORS * len(observer.eventfds)
    assert server.descriptors() == (before[0] + more, before[1] + more)
    assert {len(vectors) for vectors in observer.eventfds.values()} == {VECTORS}


def test_without_its_keeper_it_serves_on(path: Path) -> None:
    device = f"host:{path}"
    arguments = [*IVSMC, "server", str(path), "--size", "16M", "--vectors", "2", "--state"]
    with contextlib.ExitStack() as stack:
        keeper = stack.enter_context(subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True))
        assert keeper.stderr is not None
        server = KeptServer(path, keeper)
        assert "listening" in keeper.stderr.readline()
        serving = os.pidfd_open(server.serving())
        stack.callback(os.close, serving)
        stack.callback(end_process, serving)
        with answered(device) as (remote, (session,)):
            keeper.kill()
            keeper.wait()
            warm_up(remote, session)
            with answered(device) as (another_remote, (another,)):
                ask(another, b"still there")
                another.close()
                another_remote.receive()
            session.close()
            remote.receive()
        said = keeper.stderr.readline()
        while "nobody keeps" not in said:
            assert said
            said = keeper.stderr.readline()
        # Nobody goes on after it: that is a proper end.
        signal.pidfd_send_signal(serving, signal.SIGTERM)
        keeper.stderr.read()
    assert not path.exists()


def end_process(pidfd: int) -> None:
    """Kill what has not ended yet."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def test_a_hangup_starts_it_anew_and_an_interrupt_ends_both(path: Path) -> None:
    with kept_server(path) as server, running(attend, f"host:{path}") as attached:
        assert attached.receive() == "attached"
        first = server.serving()
        server.keeper.send_signal(signal.SIGHUP)
        server.until_said("goes on, with 1 peers")
        assert server.serving() != first
        # As a terminal does: to all of the group.
        server.strike(signal.SIGINT)
        server.keeper.send_signal(signal.SIGINT)
        assert server.keeper.wait() == 0
        attached.send("end")
        attached.receive()


def test_while_it_cannot_be_started_everything_is_kept(path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        away = Path(f"{directory}.away")
        with (
            kept_server(path, environment={"TMPDIR": directory}) as server,
            client(path, PATIENCE) as before,
        ):
            until_empty(Path(directory))
            # Where the next one is to be heard there is nothing.
            Path(directory).rename(away)
            server.strike(signal.SIGKILL)
            server.until_said("cannot start a process")
            assert server.starts() == 1
            away.rename(directory)
            server.until_said("goes on, with 1 peers")
            with client(path, PATIENCE) as after:
                before.wait()
            assert (before.id, after.id) == (0, 1)
            until_empty(Path(directory))


def until_empty(directory: Path) -> None:
    """Wait until nothing is in ``directory``: the keeper has heard the one that serves."""
    for _ in range(TRIES):
        if not any(directory.iterdir()):
            return
        time.sleep(0.001)
    raise AssertionError(list(directory.iterdir()))


def test_it_lives_on_where_nobody_reads_what_it_says(path: Path) -> None:
    arguments = [*IVSMC, "server", str(path), "--size", "16M", "--state"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as keeper:
        assert keeper.stderr is not None
        assert "listening" in keeper.stderr.readline()
        keeper.stderr.close()
        server = KeptServer(path, keeper)
        with client(path, PATIENCE) as before:
            for _ in range(2):
                server.replace()
                with client(path, PATIENCE) as after:
                    assert (before.id, after.id) == (0, 1)
        keeper.terminate()
    assert keeper.returncode == 0
    assert not path.exists()


def test_a_unit_that_keeps_nothing_is_told(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        name = f"{path}.notify"
        systemd.bind(name)
        arguments = [*IVSMC, "server", str(path), "--size", "16M", "--state"]
        for store, is_told in (
            ({}, True),
            ({"FDSTORE": "99"}, False),
            ({"LISTEN_FDS": "0"}, False),
        ):
            environment = {**os.environ, "NOTIFY_SOCKET": name, **store}
            with subprocess.Popen(
                arguments, stderr=subprocess.PIPE, text=True, env=environment
            ) as server:
                while systemd.recv(256) != b"READY=1":
                    pass
                server.send_signal(signal.SIGINT)
                assert server.stderr is not None
                assert ("FileDescriptorStoreMax=" in server.stderr.read()) == is_told
            assert server.returncode == 0
            systemd.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while systemd.recv(256):
                    pass
            systemd.setblocking(True)


def test_one_that_cannot_start_says_so_once(path: Path) -> None:
    done = command("server", str(path), "--size", "3M", "--state")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "take 4 MiB" in done.stderr
    assert not path.exists()


def test_whom_it_cannot_keep_it_turns_away(path: Path) -> None:
    with kept_server(path, "--vectors", "8", limit=64 + 3 + 3 * 9 + 4) as server:
        with contextlib.ExitStack() as stack:
            first, *_ = [stack.enter_context(client(path, PATIENCE)) for _ in range(3)]
            with pytest.raises(ConnectionError), client(path, PATIENCE):
                pass
            server.until_said("FileDescriptorStoreMax=")
            server.strike(signal.SIGKILL)
            server.until_started(2)
            while sum(map(len, first.eventfds.values())) < 3 * 8:
                first.wait()
            assert [len(first.eventfds[peer]) for peer in range(3)] == [8, 8, 8]


def test_descriptors_come_in_order_wherever_they_are() -> None:
    """As a program that is started with them finds them."""
    script = """
import os, random
from ivsmc._cli.keeper import _put
for seed in range(200):
    if (child := os.fork()) == 0:
        chance = random.Random(seed)
        count = chance.randrange(1, 12)
        numbers = chance.sample(range(3, 18), count)
        os.closerange(3, 40)
        wanted = []
        for number in numbers:
            fd = os.memfd_create(str(number))
            os.dup2(fd, 100 + number)
            os.close(fd)
            wanted.append(os.fstat(100 + number).st_ino)
        for number in numbers:
            os.dup2(100 + number, number, inheritable=False)
            os.close(100 + number)
        _put(numbers)
        found = [os.fstat(3 + index).st_ino for index in range(count)]
        assert all(os.get_inheritable(3 + index) for index in range(count))
        os._exit(found != wanted)
    assert os.waitpid(child, 0)[1] == 0, seed
"""
    subprocess.run([sys.executable, "-c", script], check=True)
