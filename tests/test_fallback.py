"""Every reason for plain TCP by itself: its name, its code, whose side; and where it is refused.

Each circumstance below is a listener in a process of its own and a way of connecting to it, with
what either end is to say. Tested with each: sessions that fall back and work; a client that
requires shared memory; a listener that does.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import ivsmc
from conftest import SHM
from endpoints import LOOPBACK, receive_all
from listening import Why, listen, question, relay
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

Expected: TypeAlias = tuple[str, str]
"""Name of the reason, and whose side it was."""


def said(reason: object) -> Expected:
    """The name and the side of ``reason``, whose code must be the name's and the sentence one."""
    assert isinstance(reason, ivsmc.FallbackReason), reason
    assert reason.code == CODES[reason.name]
    assert reason.sentence
    assert "\n" not in str(reason)
    return reason.name, reason.side


@dataclass
class Scene:
    """A listener in another process, and the way to it."""

    server: Remote
    address: tuple[str, int]
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of ``create_connection``."""
    resume: Callable[[], object] = lambda: None
    """To be done before the listener can accept."""

    def connect(self, **more: Any) -> ivsmc.Session:
        return ivsmc.create_connection(self.address, **self.arguments, **more)


Circumstance: TypeAlias = Callable[
    [pytest.MonkeyPatch, dict[str, Any]], AbstractContextManager[Scene]
]


@contextmanager
def listening(
    arguments: dict[str, Any],
    *,
    environment: dict[str, str] | None = None,
    address: tuple[str, int] = LOOPBACK,
) -> Iterator[Scene]:
    """A listener in a process with ``environment``; it has been told to accept."""
    with running(listen, address, environment or {}, arguments) as server:
        try:
            where = server.receive()
            if not isinstance(where, str):
                server.send("accept")
            yield Scene(server, where)
        finally:
            with suppress(OSError):  # it may have ended
                server.send(None)


@contextmanager
def disabled_client(_: pytest.MonkeyPatch, arguments: dict[str, Any]) -> Iterator[Scene]:
    with listening(arguments) as scene:
        scene.arguments["device"] = "none"
        yield scene


@contextmanager
def disabled_listener(_: pytest.MonkeyPatch, arguments: dict[str, Any]) -> Iterator[Scene]:
    with listening(arguments, environment={"IVSMC_DEVICE": "none"}) as scene:
        yield scene


@contextmanager
def client_without_device(
    environment: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> Iterator[Scene]:
    with listening(arguments) as scene:
        environment.setenv("IVSMC_DEVICE", "file:/nonexistent/region")
        yield scene


@contextmanager
def listener_without_device(_: pytest.MonkeyPatch, arguments: dict[str, Any]) -> Iterator[Scene]:
    missing = {"IVSMC_DEVICE": "file:/nonexistent/region"}
    with listening(arguments, environment=missing) as scene:
        yield scene


@contextmanager
def client_with_an_unsafe_directory(
    environment: pytest.MonkeyPatch, arguments: dict[str, Any]
) -> Iterator[Scene]:
    """Somebody else could write to the directory of ``local``."""
    with listening(arguments) as scene, directory("unsafe") as parent:
        squatted = parent / f"ivsmc-{os.getuid()}"
        squatted.mkdir()
        squatted.chmod(0o777)
        environment.setenv("IVSMC_LOCAL_DIR", str(parent))
        yield scene
        squatted.rmdir()


@contextmanager
def no_common_region(_: pytest.MonkeyPatch, arguments: dict[str, Any]) -> Iterator[Scene]:
    with directory("elsewhere") as parent:
        with listening(arguments, environment={"IVSMC_LOCAL_DIR": str(parent)}) as scene:
            yield scene
        for left in parent.iterdir():
            left.rmdir()


@contextmanager
def different_eids(environment: pytest.MonkeyPatch, arguments: dict[str, Any]) -> Iterator[Scene]:
    with listening(arguments, environment={"IVSMC_EID": "BLUE,GREEN"}) as scene:
        environment.setenv("IVSMC_EID", "RED")
        yield scene


@contextmanager
def full_region(
    arguments: dict[str, Any], *, client_buffer: int, listener_buffer: int
) -> Iterator[Scene]:
    """A region of the smallest size, filled up with open sessions."""
    with ExitStack() as opened:
        region = opened.enter_context(directory("full")) / "region"
        region.touch()
        opened.callback(region.unlink)
        os.truncate(region, 1024 * 1024)
        device = f"file:{region}"
        server_arguments = {**arguments, "device": device, "buffer": listener_buffer}
        scene = opened.enter_context(listening(server_arguments))
        scene.arguments.update(device=device, buffer=client_buffer)
        with opened.pop_all() as all_opened, ExitStack() as sessions:
            fill(scene, sessions)
            all_opened.callback(lambda: None)
            yield scene


def fill(scene: Scene, sessions: ExitStack) -> None:
    raise NotImplementedError
