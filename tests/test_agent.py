"""Processes of one machine that share its device through an agent."""

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

import ivsmc
from agents import Agent, ask_when_told, echo, open_as_nobody, running_agent, stream_to, take_part
from blocked import until_blocked
from commands import command
from endpoints import LOOPBACK, receive_exactly
from processes import running
from random_stream import LARGEST, RandomStream, send_stream
from test_death import GENEROUS, TRIES, assert_clean

TOTAL = 16 * 1024 * 1024
"""Bytes each way of a stream."""
HEAD = 1024 * 1024
"""Bytes of it that come before something happens."""
ROUNDS = 10


@pytest.fixture
def directory(device_specs: dict[str, str]) -> Iterator[Path]:
    """Where an agent may have its socket and its region; gone after the test."""
    where = Path(device_specs["host"].removeprefix("host:")).with_name("agent")
    where.mkdir()
    yield where
    for file in where.iterdir():
        file.unlink()
    where.rmdir()


@pytest.fixture
def agent(directory: Path) -> Iterator[Agent]:
    """An agent whose device has a vector for each of three clients, and one for itself."""
    with running_agent(directory, 4) as agent:
        yield agent


def wait_for(agent: Agent, clients: int, died: int) -> None:
    """Wait until the agent has seen who left and who died; nobody tells when."""
    for _ in range(TRIES):
        status = agent.status()
        if (status.clients, status.died) == (clients, died):
            return
        time.sleep(0.001)
    raise AssertionError(agent.status())


def test_processes_stream_to_each_other_and_to_a_third(agent: Agent) -> None:
    """Two with the agent's device and one that reaches the region another way, all at once."""
    with ExitStack() as stack:
        one, two, third = (
            stack.enter_context(running(take_part, device, TOTAL))
            for device in (agent.device, agent.device, agent.region)
        )
        places = [remote.receive() for remote in (one, two, third)]
        one.send(([], 2))
        two.send((places[:1], 1))
        third.send((places[:2], 0))
        neighbours = one.receive() + two.receive() + third.receive()
        for stats in neighbours:
            assert (stats["bytes_sent"], stats["bytes_received"]) == (TOTAL, TOTAL)
        # The third has no doorbells; the two notify each other by the device.
        by_doorbell = [stats["doorbells_sent"] > 0 for stats in neighbours]
        assert by_doorbell.count(True) == 2, neighbours
        assert agent.status().doorbells > 0
    wait_for(agent, clients=0, died=0)


def test_one_is_killed_and_the_other_does_not_notice(agent: Agent) -> None:
    """In the middle of its stream the other waits while one dies; then it goes on."""
    with (
        closing(ivsmc.open_device(agent.region)) as region,
        ivsmc.create_server(LOOPBACK, device=agent.region) as listener,
        running(stream_to, agent.device, listener.getsockname(), TOTAL) as victim,
    ):
        doomed, _ = listener.accept()
        with doomed, running(stream_to, agent.device, listener.getsockname(), TOTAL) as other:
            doomed.settimeout(GENEROUS)
            session, _ = listener.accept()
            with session, ThreadPoolExecutor(2) as pool:
                session.settimeout(GENEROUS)
                sending = pool.submit(send_stream, session, 2, TOTAL)
                # The rest of both streams waits until one of them has died.
                assert receive_exactly(doomed, HEAD) == RandomStream(1).take(HEAD)
                assert receive_exactly(session, HEAD) == RandomStream(1).take(HEAD)
                victim.kill()
                wait_for(agent, clients=1, died=1)
                with pytest.raises(ConnectionResetError):
                    while doomed.recv(65536):
                        pass
                # Its slot and all its memory are back, but for what this end still holds.
                assert region.census()["live"] == 2
                doomed.close()
                rest = RandomStream(1)
                rest.position = HEAD
                while left := TOTAL - rest.position:
                    data = session.recv(min(left, LARGEST))
                    assert data == rest.take(len(data)), rest.position
                assert session.recv(1) == b""
                sending.result()
            other.receive()
        wait_for(agent, clients=0, died=1)
        listener.close()
        assert_clean(region)


def test_many_processes_one_after_the_other_leave_nothing(agent: Agent) -> None:
    with running(echo, agent.device, ROUNDS) as remote:
        address = remote.receive()
        open_files = 0
        for number in range(ROUNDS):
            with running(ask_when_told, agent.device, address) as client:
                client.send(True)
                assert client.receive() == "answered"
                if number == 0:
                    open_files = agent.status().open_files
                assert agent.status().open_files == open_files
                if number % 2:
                    client.kill()
                else:
                    client.send(False)
                    client.receive()
            wait_for(agent, clients=1, died=(number + 1) // 2)
        remote.receive()
    wait_for(agent, clients=0, died=ROUNDS // 2)
    with closing(ivsmc.open_device(agent.region)) as region:
        assert_clean(region)


@pytest.mark.parametrize("vectors", [1, 2, 4])
def test_all_are_woken_when_vectors_run_out(directory: Path, vectors: int) -> None:
    """A server and five clients, each asleep whenever it waits; some have to share a vector."""
    clients = 5
    with ExitStack() as stack:
        agent = stack.enter_context(running_agent(directory, vectors))
        server = stack.enter_context(running(echo, agent.device, clients))
        address = server.receive()
        asking = [
            stack.enter_context(running(ask_when_told, agent.device, address))
            for _ in range(clients)
        ]
        received: list[int] = []
        # On a busy machine the answer may be there before the client sleeps, round after round.
        for number in range(100 * ROUNDS):
            for one in asking:
                one.send(True)
            assert {one.receive() for one in asking} == {"answered"}
            for one in asking:
                one.send("count")
            received = [one.receive()["doorbells_received"] for one in asking]
            if number >= ROUNDS and all(received):
                break
        assert all(received), received
        status = agent.status()
        assert status.clients == clients + 1
        assert status.shared == {1: 6, 2: 6, 4: 4}[vectors]
        assert status.doorbells > 0
        for one in asking:
            one.send(False)
        for one in asking:
            one.receive()
        server.receive()
    wait_for_nobody = ivsmc.open_device(agent.region)
    with closing(wait_for_nobody):
        assert wait_for_nobody.census()["live"] == 1


def test_processes_outlive_their_agent_and_newcomers_hear_why(agent: Agent) -> None:
    with running(echo, agent.device, 1) as remote:
        address = remote.receive()
        with running(ask_when_told, agent.device, address) as client:
            client.send(True)
            assert client.receive() == "answered"
            agent.kill()
            with pytest.raises(ivsmc.DeviceError, match="the agent has ended"):
                ivsmc.open_device(agent.device)
            for _ in range(3):
                until_blocked(remote.process.pid)
                client.send(True)
                assert client.receive() == "answered"
            client.send(False)
            assert client.receive()["doorbells_sent"] > 0
        remote.receive()
    # They have left by themselves: nothing is there to be taken back.
    with closing(ivsmc.open_device(agent.region)) as region:
        assert_clean(region)


def test_a_process_that_ends_an_attachment_gives_its_slot_back(agent: Agent) -> None:
    for _ in range(3):
        with closing(ivsmc.open_device(agent.device)) as device:
            assert (device.kind, device.census()["live"]) == ("agent", 1)
            assert agent.status().clients == 1
            assert device.stats()["vector"] == 1
        ivsmc._native.shutdown()
        wait_for(agent, clients=0, died=0)


def test_who_speaks_something_else_is_sent_away(agent: Agent) -> None:
    path = agent.device.removeprefix("agent:")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(path)
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"not a client of an agent" in stranger.recv(1000)
    assert agent.status().clients == 0


def test_who_reaches_the_socket_but_was_not_to_is_refused(agent: Agent, directory: Path) -> None:
    """Its permissions when the agent began count, not those of the moment."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    for path in (directory.parent, directory):
        path.chmod(0o711)
    Path(agent.device.removeprefix("agent:")).chmod(0o666)
    with running(open_as_nobody, agent.device) as other:
        (said,) = other.receive()
    assert said.endswith("may not use the device; --mode and --group say who may")
    assert agent.status().clients == 0


def test_the_command_without_a_device(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    alone = command("agent", "--socket", str(path))
    assert (alone.returncode, alone.stdout) == (1, "")
    assert "bound to vfio-pci; as root: ivsmc bind" in alone.stderr
    named = command("agent", "--socket", str(path), "00:1f.7")
    assert "0000:00:1f.7: there is no PCI device here" in named.stderr
    assert not path.exists()
    for arguments, words in [
        (["eth0"], "no PCI address"),
        (["--mode", "999"], "not permissions"),
        (["--group", "no such group"], "there is no group"),
        (["--group", "4294967295"], "no number of a group"),
        (["--group", "99999999999"], "no number of a group"),
    ]:
        wrong = command("agent", "--socket", str(path), *arguments)
        assert wrong.returncode != 0
        assert "Traceback" not in wrong.stderr
        assert words in wrong.stderr
