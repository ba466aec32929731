"""Every address a listener of this host can be reached by, from every source address."""

import socket
from contextlib import suppress

import pytest

import ivsmc
from endpoints import receive_all

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the kernel has no IPv6")


def own_address(family: socket.AddressFamily) -> str:
    """An address of this host that is not a loopback address; skips where there is none."""
    # Documentation addresses (RFC 5737, RFC 3849); connecting UDP sends nothing.
    somewhere = "192.0.2.1" if family == socket.AF_INET else "2001:db8::1"
    with socket.socket(family, socket.SOCK_DGRAM) as udp, suppress(OSError):
        udp.connect((somewhere, 9))
        return str(udp.getsockname()[0])
    pytest.skip(f"this host has no {family.name} address but loopback")


def own_link_local_address() -> str:
    """A link-local address with its interface; skips where there is none."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp, suppress(OSError):
            udp.connect(socket.getaddrinfo(f"ff02::1%{name}", 9, socket.AF_INET6)[0][4])
            address = str(udp.getsockname()[0]).partition("%")[0]
            if address.startswith("fe80:"):
                return f"{address}%{name}"
    pytest.skip("this host has no link-local address")


def check(
    listener: ivsmc.Listener,
    host: str,
    device: str,
    *,
    source: tuple[str, int] | None = None,
    transport: str | None = None,
) -> None:
    """One session to ``host``, accepted in the same thread, carries data."""
    expected = transport or ("tcp" if device == "none" else "smc")
    address = (host, listener.getsockname()[1])
    with ivsmc.create_connection(address, source_address=source, device=device) as near:
        far, peer = listener.accept()
        with far:
            assert near.transport == far.transport == expected, near.fallback_reason
            assert peer == far.getpeername()
            assert peer[1] == near.getsockname()[1]
            if source is not None:
                assert near.getsockname()[0] == source[0]
            far.sendall(host.encode())
        assert receive_all(near) == host.encode()


@pytest.mark.parametrize("bound", ["", "127.0.0.1"])
def test_loopback(device: str, bound: str) -> None:
    with ivsmc.create_server((bound, 0), device=device) as listener:
        for host in ("127.0.0.1", "localhost"):
            check(listener, host, device)
        if not bound:
            for host in ("127.1.2.3", "0.0.0.0"):
                check(listener, host, device)


@needs_ipv6
@pytest.mark.parametrize("bound", ["::", "::1"])
def test_ipv6_loopback(device: str, bound: str) -> None:
    with ivsmc.create_server((bound, 0), family=socket.AF_INET6, device=device) as listener:
        check(listener, "::1", device)
        if bound == "::":
            check(listener, "::", device)


@needs_ipv6
def test_a_dual_stack_listener(device: str) -> None:
    with ivsmc.create_server(
        ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, device=device
    ) as listener:
        for host in ("127.0.0.1", "::1", "localhost", "::ffff:127.0.0.1"):
            check(listener, host, device)
        check(listener, own_address(socket.AF_INET), device)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("bound", ["wildcard", "the address"])
def test_an_address_of_this_host(device: str, family: socket.AddressFamily, bound: str) -> None:
    host = own_address(family)
    where = (host if bound == "the address" else "", 0)
    with ivsmc.create_server(where, family=family, device=device) as listener:
        check(listener, host, device)


def test_a_listener_of_another_address_is_not_found(device: str) -> None:
    host = own_address(socket.AF_INET)
    with ivsmc.create_server(("127.0.0.1", 0), device=device) as listener:
        with pytest.raises(ConnectionRefusedError):
            ivsmc.create_connection((host, listener.getsockname()[1]), device=device)


@needs_ipv6
def test_a_link_local_address_is_plain_tcp(device: str) -> None:
    """It means another host on every link, so it finds nobody in the directory."""
    with ivsmc.create_server(("::", 0), family=socket.AF_INET6, device=device) as listener:
        check(listener, own_link_local_address(), device, transport="tcp")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7"])
def test_from_a_source_address(device: str, free_port: int, host: str) -> None:
    with ivsmc.create_server(("", 0), device=device) as listener:
        check(listener, "127.0.0.1", device, source=(host, 0))
        check(listener, "127.0.0.1", device, source=(host, free_port))


def test_from_an_address_of_this_host_to_loopback_and_back(device: str) -> None:
    own = own_address(socket.AF_INET)
    with ivsmc.create_server(("", 0), device=device) as listener:
        check(listener, "127.0.0.1", device, source=(own, 0))
        check(listener, own, device, source=("127.0.0.1", 0))


@needs_ipv6
def test_from_an_ipv6_source_address(device: str, free_port: int) -> None:
    with ivsmc.create_server(("::", 0), family=socket.AF_INET6, device=device) as listener:
        check(listener, "::1", device, source=("::1", free_port))


def test_a_source_port_that_is_taken(device: str) -> None:
    with ivsmc.create_server(("127.0.0.1", 0), device=device) as listener:
        address = listener.getsockname()
        with pytest.raises(OSError, match="Address already in use"):
            ivsmc.create_connection(address, source_address=address, device=device)
