"""Every reason for plain TCP by itself: its name, its code, whose side; and where it is refused.

A circumstance is a listener in a process of its own, a way of connecting to it, and what both ends
say then. Each is tested with sessions that fall back, with a client that requires shared memory,
and with a listener that does.
"""

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

import ivsmc
from conftest import SHM
from endpoints import LOOPBACK, hasty, receive_all
from listening import listen, question, relay
from processes import Remote, running

CODES = {
    "PEER_NO_SMC": 0x0301_0000,
    "DISABLED": 0x0300_0000,
    "NO_DEVICE": 0x0303_0000,
    "LOCAL_UNSAFE": 0x0303_0000,
    "NOT_MATCHED": 0x0301_0000,
    "RECENTLY_NOT_MATCHED": 0x0301_0000,
    "PEER_SPOKE_FIRST": 0x0301_0000,
    "PLAIN_CLIENT": 0x0301_0000,
    "REGION_FULL": 0x030D_0000,
    "EID_MISMATCH": 0x0303_0008,
}
NOWHERE = {"IVSMC_DEVICE": "file:/nonexistent/region"}


class Said(NamedTuple):
    """What is stable of a fallback reason."""

    name: str
    side: str

    @classmethod
    def by(cls, reason: object) -> "Said":
        assert isinstance(reason, ivsmc.FallbackReason), reason
        assert reason.code == CODES[reason.name]
        assert reason.sentence
        assert "\n" not in str(reason)
        return cls(reason.name, reason.side)

    def begins(self) -> str:
        """What the text of an exception has of it."""
        return f"{self.name} ({CODES[self.name]:#010x})"


@dataclass
class Scene:
    """A listener in another process that was told to accept, and the way to it."""

    server: Remote
    address: Any
    """Where it listens; the text of ``SMCRequired`` if it does not."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of ``create_connection``."""
    resume: Callable[[], None] = lambda: None
    """What the listener needs before it can accept, once a client has connected."""
    held: list[ivsmc.Session] = field(default_factory=list)
    """Open sessions to it."""

    def connect(self, **more: Any) -> ivsmc.Session:
        return ivsmc.create_connection(self.address, **self.arguments, **more)


@contextmanager
def listening(
    arguments: dict[str, Any],
    environment: dict[str, str] | None = None,
    *,
    address: tuple[str, int] = LOOPBACK,
    told: bool = True,
) -> Iterator[Scene]:
    with running(listen, address, environment or {}, arguments) as server:
        scene = Scene(server, server.receive())
        if told and not isinstance(scene.address, str):
            server.send("accept")
        yield scene
        with suppress(OSError, EOFError):  # it has ended by itself, or was killed
            server.send(None)
            server.receive()


@contextmanager
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ivsmc-tests-", dir=SHM))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def disabled_client(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    with listening(arguments) as scene:
        scene.arguments["device"] = "none"
        yield scene


@contextmanager
def disabled_listener(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    with listening(arguments, {"IVSMC_DEVICE": "none"}) as scene:
        yield scene


@contextmanager
def client_without_device(
    arguments: dict[str, Any], environment: pytest.MonkeyPatch
) -> Iterator[Scene]:
    with listening(arguments) as scene:
        environment.setenv(*NOWHERE.copy().popitem())
        yield scene


@contextmanager
def listener_without_device(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    with listening(arguments, NOWHERE) as scene:
        yield scene


@contextmanager
def client_with_an_unsafe_directory(
    arguments: dict[str, Any], environment: pytest.MonkeyPatch
) -> Iterator[Scene]:
    """Anybody can write to its directory of ``local``."""
    with listening(arguments) as scene, directory() as parent:
        own = parent / f"ivsmc-{os.getuid()}"
        own.mkdir()
        own.chmod(0o777)
        environment.setenv("IVSMC_LOCAL_DIR", str(parent))
        yield scene


@contextmanager
def no_common_region(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    with directory() as parent:
        with listening(arguments, {"IVSMC_LOCAL_DIR": str(parent)}) as scene:
            yield scene


@contextmanager
def different_eids(arguments: dict[str, Any], environment: pytest.MonkeyPatch) -> Iterator[Scene]:
    with listening(arguments, {"IVSMC_EID": "BLUE,GREEN"}) as scene:
        environment.setenv("IVSMC_EID", "RED")
        yield scene


@contextmanager
def full_for_the_listener(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    """An odd number of extents, and each of its buffers is a whole one."""
    with full_region(arguments, 15, listener_buffer=65536, client_buffer=16384) as scene:
        yield scene


@contextmanager
def full_for_the_client(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    """The last extent is the listener's, and it has room in it when the client needs one."""
    with full_region(arguments, 16, listener_buffer=16384, client_buffer=65536) as scene:
        yield scene


@contextmanager
def full_region(
    arguments: dict[str, Any], extents: int, *, listener_buffer: int, client_buffer: int
) -> Iterator[Scene]:
    """A region of ``extents``, 64 KiB each, filled up with open sessions."""
    with directory() as parent, ExitStack() as opened:
        region = parent / "region"
        with region.open("xb") as file:
            file.truncate(65536 * (1 + extents))  # what is no extent takes up one
        device = f"file:{region}"
        at_listener = {"device": device, "buffer": listener_buffer}
        scene = opened.enter_context(listening({**arguments, **at_listener}, told=False))
        scene.arguments = {"device": device, "buffer": client_buffer}
        full = False
        while not full:
            scene.server.send("hold")
            session = opened.enter_context(scene.connect())
            scene.held.append(session)
            scene.server.receive()
            reason = session.fallback_reason
            full = reason is not None and reason.name == "REGION_FULL"
        scene.server.send("accept")
        yield scene


@contextmanager
def translated_address(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    """The directory has the client's destination, but the connection comes from a relay."""
    everywhere = {**arguments, "reuse_port": True}
    with listening(everywhere, address=("", 0)) as scene:
        port = scene.address[1]
        with socket.create_server(("127.0.0.2", port), reuse_port=True) as router:
            scene.address = router.getsockname()
            with relay(router, ("127.0.0.1", port)), hasty():
                yield scene


@contextmanager
def stopped_listener(arguments: dict[str, Any], _: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Its process is halted."""
    with listening(arguments) as scene:
        pid = scene.server.process.pid
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        scene.resume = lambda: os.kill(pid, signal.SIGCONT)
        with hasty():
            yield scene


@contextmanager
def listener_that_does_not_accept(
    arguments: dict[str, Any], _: pytest.MonkeyPatch
) -> Iterator[Scene]:
    with listening(arguments, told=False) as scene, hasty():
        scene.resume = lambda: scene.server.send("accept")
        yield scene


Circumstance: TypeAlias = Callable[
    [dict[str, Any], pytest.MonkeyPatch], AbstractContextManager[Scene]
]

PLAIN_CLIENT = Said("PLAIN_CLIENT", "peer")
PEER_NO_SMC = Said("PEER_NO_SMC", "peer")
NOT_MATCHED = Said("NOT_MATCHED", "peer")
CASES: list[tuple[Circumstance, Said, Said]] = [
    # What the client says, and what the listener's side says.
    (disabled_client, Said("DISABLED", "local"), PLAIN_CLIENT),
    (disabled_listener, PEER_NO_SMC, Said("DISABLED", "local")),
    (client_without_device, Said("NO_DEVICE", "local"), PLAIN_CLIENT),
    (listener_without_device, PEER_NO_SMC, Said("NO_DEVICE", "local")),
    (client_with_an_unsafe_directory, Said("LOCAL_UNSAFE", "local"), PLAIN_CLIENT),
    (no_common_region, PEER_NO_SMC, PLAIN_CLIENT),
    (different_eids, Said("EID_MISMATCH", "peer"), Said("EID_MISMATCH", "local")),
    (full_for_the_listener, Said("REGION_FULL", "peer"), Said("REGION_FULL", "local")),
    (full_for_the_client, Said("REGION_FULL", "local"), Said("REGION_FULL", "peer")),
    (translated_address, NOT_MATCHED, PLAIN_CLIENT),
    (stopped_listener, NOT_MATCHED, PLAIN_CLIENT),
    (listener_that_does_not_accept, NOT_MATCHED, PLAIN_CLIENT),
]
in_each_circumstance = pytest.mark.parametrize(
    ("circumstance", "at_client", "at_listener"),
    [pytest.param(*case, id=case[0].__name__) for case in CASES],
)


@in_each_circumstance
def test_plain_tcp_with_its_reason(
    circumstance: Circumstance,
    at_client: Said,
    at_listener: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with circumstance({}, monkeypatch) as scene, scene.connect() as session:
        assert session.transport == "tcp"
        assert Said.by(session.fallback_reason) == at_client
        scene.resume()
        assert Said.by(scene.server.receive()) == at_listener
        assert question(session) == b"question"


@in_each_circumstance
def test_a_client_that_requires_shared_memory(
    circumstance: Circumstance,
    at_client: Said,
    at_listener: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with circumstance({}, monkeypatch) as scene:
        with pytest.raises(ivsmc.SMCRequired) as caught:
            scene.connect(require="smc")
        assert at_client.begins() in str(caught.value)
        scene.resume()
        # Where the client knew before it connected, this is the connection that is accepted.
        socket.create_connection(scene.address).close()
        assert Said.by(scene.server.receive()) in (at_listener, PLAIN_CLIENT)


@in_each_circumstance
def test_a_listener_that_requires_shared_memory(
    circumstance: Circumstance,
    at_client: Said,
    at_listener: Said,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with circumstance({"require": "smc"}, monkeypatch) as scene:
        if isinstance(scene.address, str):
            assert at_listener.side == "local"
            assert at_listener.begins() in scene.address
            return
        with scene.connect() as session:
            said = Said.by(session.fallback_reason)
            # It may still have been waiting for an answer when the connection was closed.
            assert said == at_client or (at_client, said.name) == (NOT_MATCHED, "PEER_SPOKE_FIRST")
            scene.resume()
            assert at_listener.begins() in scene.server.receive()
            with suppress(ConnectionResetError):
                assert receive_all(session) == b""


def test_a_listener_that_does_not_accept_is_asked_twice() -> None:
    """After that, nobody waits for it any more, for a while."""
    with listening({}, told=False) as scene, hasty(), ExitStack() as opened:
        sessions = [opened.enter_context(scene.connect()) for _ in range(3)]
        names = [Said.by(session.fallback_reason).name for session in sessions]
        assert names == ["NOT_MATCHED", "NOT_MATCHED", "RECENTLY_NOT_MATCHED"]
        with pytest.raises(ivsmc.SMCRequired, match="RECENTLY_NOT_MATCHED"):
            scene.connect(require="smc")
        for session in sessions:
            scene.server.send("accept")
            assert Said.by(scene.server.receive()) == PLAIN_CLIENT
            assert question(session) == b"question"


def test_the_sentence_names_what_was_looked_at(device_specs: dict[str, str]) -> None:
    devices = f"{device_specs['file']},{device_specs['host']}"
    with socket.create_server(LOOPBACK) as server:
        address = server.getsockname()
        with ivsmc.create_connection(address, device=devices) as session:
            assert session.fallback_reason is not None
            for words in (device_specs["file"], device_specs["host"], f"{address[1]}"):
                assert words in session.fallback_reason.sentence


def test_a_full_region_has_room_again_when_sessions_end() -> None:
    with full_region({}, 15, listener_buffer=65536, client_buffer=65536) as scene:
        with scene.connect() as session:
            assert session.transport == "tcp"
            scene.server.receive()
        scene.server.kill()
        for session in scene.held:
            session.close()
        device = scene.arguments["device"]
        with ivsmc.create_server(LOOPBACK, device=device, require="smc") as listener:
            address = listener.getsockname()
            with ivsmc.create_connection(address, require="smc", **scene.arguments):
                listener.accept()[0].close()
