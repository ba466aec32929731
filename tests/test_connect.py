"""``create_connection``: the standard library's arguments, errors and loop over addresses."""

import socket
from typing import Any

import pytest

import ivsmc
from endpoints import LOOPBACK, receive_all


def test_nobody_listens(device: str, free_port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        ivsmc.create_connection(("127.0.0.1", free_port), device=device)


def test_every_error_of_the_loop_in_a_group(free_port: int) -> None:
    with pytest.raises(ExceptionGroup, match="create_connection failed") as caught:
        ivsmc.create_connection(("127.0.0.1", free_port), all_errors=True)
    assert [type(error) for error in caught.value.exceptions] == [ConnectionRefusedError]


def test_the_next_address_is_tried(
    monkeypatch: pytest.MonkeyPatch, device: str, free_port: int
) -> None:
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        good = listener.getsockname()
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", free_port)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", good),
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
        with ivsmc.create_connection(("two.addresses", 1), device=device) as near:
            assert near.getpeername() == good
            listener.accept()[0].close()


def test_an_unknown_name() -> None:
    with pytest.raises(socket.gaierror):
        ivsmc.create_connection(("no-such-name.invalid", 1))


@pytest.mark.parametrize(
    ("arguments", "expected"), [({"timeout": 7}, 7.0), ({"timeout": None}, None), ({}, None)]
)
def test_the_timeout_stays_set(
    device: str, arguments: dict[str, Any], expected: float | None
) -> None:
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        address = listener.getsockname()
        with ivsmc.create_connection(address, device=device, **arguments) as near:
            assert near.gettimeout() == expected
            far, _ = listener.accept()
            far.close()


def test_the_default_timeout_is_inherited(device: str) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(11.5)
    try:
        with ivsmc.create_server(LOOPBACK, device=device) as listener:
            assert listener.gettimeout() == 11.5
            with ivsmc.create_connection(listener.getsockname(), device=device) as near:
                far, _ = listener.accept()
                with far:
                    assert near.gettimeout() == far.gettimeout() == 11.5
            given = socket._GLOBAL_DEFAULT_TIMEOUT  # type: ignore[attr-defined]
            with ivsmc.create_connection(listener.getsockname(), given, device=device) as near:
                assert near.gettimeout() == 11.5
                listener.accept()[0].close()
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.parametrize(
    ("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), ("soon", TypeError)]
)
def test_a_timeout_that_is_none(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        ivsmc.create_connection(LOOPBACK, timeout)


def test_no_time_at_all_is_what_a_non_blocking_socket_says() -> None:
    with socket.create_server(LOOPBACK) as listener:
        with pytest.raises(BlockingIOError):
            ivsmc.create_connection(listener.getsockname(), 0)


def test_a_source_address_is_used(device: str, free_port: int) -> None:
    port = free_port
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        with ivsmc.create_connection(
            listener.getsockname(), source_address=("127.0.0.1", port), device=device
        ) as near:
            far, address = listener.accept()
            with far:
                assert address == near.getsockname() == ("127.0.0.1", port)
                expected = "tcp" if device == "none" else "smc"
                assert near.transport == far.transport == expected, near.fallback_reason


def test_any_source_address(device: str) -> None:
    with ivsmc.create_server(LOOPBACK, device=device) as listener:
        address = listener.getsockname()
        with ivsmc.create_connection(address, source_address=("", 0), device=device) as near:
            far, _ = listener.accept()
            far.close()
            assert near.getsockname()[0] == "127.0.0.1"


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the kernel has no IPv6")
def test_ipv6_and_names(device: str) -> None:
    with ivsmc.create_server(
        ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, device=device
    ) as listener:
        port = listener.getsockname()[1]
        for host in ("::1", "127.0.0.1", "localhost"):
            with ivsmc.create_connection((host, port), device=device) as near:
                far, _ = listener.accept()
                with far:
                    expected = "tcp" if device == "none" else "smc"
                    assert near.transport == expected, near.fallback_reason
                    assert far.getpeername()[:2][1] == near.getsockname()[1]
                    far.sendall(host.encode())
                assert receive_all(near) == host.encode()


def test_an_unknown_device_is_named() -> None:
    with socket.create_server(LOOPBACK) as listener:
        for make in (ivsmc.create_connection, ivsmc.create_server):
            address = listener.getsockname() if make is ivsmc.create_connection else LOOPBACK
            with pytest.raises(ivsmc.DeviceError, match="bogus:1"):
                make(address, device="bogus:1")


def test_only_smc_can_be_required() -> None:
    for make in (ivsmc.create_connection, ivsmc.create_server):
        with pytest.raises(ValueError, match="'rdma'"):
            make(LOOPBACK, require="rdma")  # type: ignore[arg-type]


def test_required_shared_memory_that_is_off() -> None:
    with socket.create_server(LOOPBACK) as listener:
        with pytest.raises(ivsmc.SMCRequired, match="DISABLED") as caught:
            ivsmc.create_connection(listener.getsockname(), device="none", require="smc")
    assert isinstance(caught.value, ConnectionError)


def test_required_shared_memory_with_a_plain_server(shared_device: str) -> None:
    with socket.create_server(LOOPBACK) as listener:
        with pytest.raises(ivsmc.SMCRequired, match="PEER_NO_SMC"):
            ivsmc.create_connection(listener.getsockname(), device=shared_device, require="smc")


def test_required_shared_memory_that_is_there(shared_device: str) -> None:
    with ivsmc.create_server(LOOPBACK, device=shared_device, require="smc") as listener:
        with ivsmc.create_connection(
            listener.getsockname(), device=shared_device, require="smc"
        ) as near:
            far, _ = listener.accept()
            with far:
                assert near.transport == far.transport == "smc"
