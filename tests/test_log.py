"""One log line for each new reason and address of a fallback."""

import logging

import pytest

import ivsmc
from endpoints import LOOPBACK
from ivsmc import _fallback


def test_a_fallback_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fallback, "_LOGGED", set())
    caplog.set_level(logging.INFO, logger="ivsmc")
    with ivsmc.create_server(LOOPBACK, device="none") as listener:
        address = listener.getsockname()
        for _ in range(3):
            with ivsmc.create_connection(address, device="none"):
                listener.accept()[0].close()
    assert [record.getMessage().split(" (0x")[0] for record in caplog.records] == [
        f"connected to {address} over TCP: DISABLED",
        "accepted from 127.0.0.1 over TCP: DISABLED",
    ]


def test_shared_memory_is_not_worth_a_line(
    caplog: pytest.LogCaptureFixture, shared_device: str
) -> None:
    caplog.set_level(logging.INFO, logger="ivsmc")
    with (
        ivsmc.create_server(LOOPBACK, device=shared_device) as listener,
        ivsmc.create_connection(listener.getsockname(), device=shared_device),
    ):
        listener.accept()[0].close()
    assert caplog.records == []
