"""Bad input: an error that names what is wrong, where, and what mends it; nothing is left."""

import array
import contextlib
import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ivsmc
from endpoints import LOOPBACK, Endpoint, session_pair
from processes import Here, running

MIB = 1 << 20
AT_VERSION = 8
AT_SIZE = 16
"""Offsets of the superblock's words (PROTOCOL.md)."""


def open_device(spec: str) -> None:
    ivsmc.open_device(spec).close()


def connect_through(spec: str) -> None:
    with socket.create_server(LOOPBACK) as listener:
        ivsmc.create_connection(listener.getsockname(), device=spec).close()


def listen_on(spec: str) -> None:
    ivsmc.create_server(LOOPBACK, device=spec).close()


@pytest.fixture(params=[open_device, connect_through, listen_on], ids=lambda use: use.__name__)
def use(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """A way to use a device that is named."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory on a file system that shares memory."""
    with tempfile.TemporaryDirectory(dir=os.environ["IVSMC_LOCAL_DIR"]) as name:
        yield Path(name)


def refusal(use: Callable[[str], None], spec: str) -> str:
    """What is said about ``spec``, which names it first."""
    with pytest.raises(ivsmc.DeviceError) as caught:
        use(spec)
    said = str(caught.value)
    assert said.startswith((f"device {spec}: ", f"region of device {spec}: ")), said
    return said


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lokal", "not a device"),
        ("file:", 'no path after "file:"'),
        ("host:", 'no path after "host:"'),
        ("local:/dev/shm", '"local" takes no path'),
        ("vfio:05", 'no PCI address after "vfio:"'),
        ("pci:", 'no PCI address after "pci:"'),
        ("agent:", 'no path after "agent:"'),
    ],
)
def test_a_spec_that_is_none(use: Callable[[str], None], spec: str, said: str) -> None:
    words = refusal(use, spec)
    assert said in words
    assert '"host:/path/of/an/ivshmem/server.sock"' in words  # which there are


def test_none_beside_others(use: Callable[[str], None]) -> None:
    with pytest.raises(ivsmc.DeviceError, match="cannot stand beside other devices"):
        use("local,none")


def test_a_bad_spec_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IVSMC_DEVICE", "lokal")
    with pytest.raises(ivsmc.DeviceError, match=r"device lokal: .*from the variable IVSMC_DEVICE"):
        ivsmc.create_server(LOOPBACK)


def test_no_such_file(use: Callable[[str], None], place: Path) -> None:
    said = refusal(use, f"file:{place}/region")
    assert f'"truncate -s 64M {place}/region"' in said


def test_a_file_that_is_too_small(use: Callable[[str], None], place: Path) -> None:
    file = place / "region"
    file.touch()
    said = refusal(use, f"file:{file}")
    assert "0 bytes" in said
    assert "at least 1 MiB" in said
    assert f'"truncate -s 64M {file}"' in said
    look_anew()
    file.write_bytes(b"a letter")
    said = refusal(use, f"file:{file}")
    assert "8 bytes" in said
    assert str(file) not in said.split("at least")[1], "do not write to somebody's letter"
    assert file.read_bytes() == b"a letter"


def test_what_is_no_file(use: Callable[[str], None], place: Path) -> None:
    assert "it is a directory" in refusal(use, f"file:{place}")
    assert "not a regular file" in refusal(use, "file:/dev/null")


def test_a_file_that_holds_something_else(use: Callable[[str], None], place: Path) -> None:
    file = place / "region"
    content = b"Dear reader, " * (MIB // 13 + 1)
    file.write_bytes(content)
    said = refusal(use, f"file:{file}")
    assert "not an ivsmc region" in said
    assert "at offset 0" in said
    assert file.read_bytes() == content


def test_a_byte_of_something_else_far_from_the_start(
    use: Callable[[str], None], place: Path
) -> None:
    file = place / "region"
    content = bytearray(MIB)
    content[4000] = 1
    file.write_bytes(content)
    assert "at offset 4000" in refusal(use, f"file:{file}")
    assert file.read_bytes() == content


def look_anew() -> None:
    """Leave what was opened, forget what could not be: else that is remembered for a second."""
    assert ivsmc._native.shutdown()


def region_file(place: Path, size: int = MIB) -> Path:
    """A file with a region in it that somebody has used and left."""
    file = place / "region"
    with file.open("xb") as made:
        made.truncate(size)
    open_device(f"file:{file}")
    look_anew()
    return file


def patch(file: Path, offset: int, value: int) -> None:
    with file.open("r+b") as patched:
        patched.seek(offset)
        patched.write(struct.pack("<Q", value))


def test_another_version(use: Callable[[str], None], place: Path) -> None:
    file = region_file(place)
    patch(file, AT_VERSION, 7777)
    said = refusal(use, f"file:{file}")
    assert "version 7777" in said
    assert "use the same ivsmc everywhere" in said
    with pytest.raises(ivsmc.RegionError):
        use(f"file:{file}")


def test_a_region_that_was_grown_or_cut(use: Callable[[str], None], place: Path) -> None:
    file = region_file(place, 4 * MIB)
    for size in (2 * MIB, 8 * MIB):
        os.truncate(file, size)
        look_anew()
        said = refusal(use, f"file:{file}")
        assert f"was made with {4 * MIB} bytes, but the memory has {size}" in said


def test_a_damaged_superblock(use: Callable[[str], None], place: Path) -> None:
    file = region_file(place)
    patch(file, AT_SIZE + 4 * 8, 12345)
    assert "superblock is damaged: 12345 at offset 48" in refusal(use, f"file:{file}")


def test_garbage_everywhere_but_in_the_superblock(place: Path) -> None:
    """It is attached to: whatever is read there is judged when it is used."""
    file = region_file(place)
    with file.open("r+b") as patched:
        superblock = patched.read(128)
        patched.seek(0)
        patched.write(superblock)
        patched.write(os.urandom(MIB - 128))
    spec = f"file:{file}"
    with contextlib.suppress(OSError):  # full of peers that nobody can say are dead, perhaps
        with ivsmc.create_server(LOOPBACK, device=spec) as listener:
            with ivsmc.create_connection(listener.getsockname(), device=spec) as near:
                far, _ = listener.accept()
                with far:
                    near.sendall(b"works")
                    assert far.recv(5, socket.MSG_WAITALL) == b"works"


@pytest.mark.parametrize(
    ("path", "name"),
    [("/proc/self/comm", "proc"), ("/sys/kernel/mm/transparent_hugepage/enabled", "sysfs")],
)
def test_a_file_system_that_does_not_share_memory(
    use: Callable[[str], None], path: str, name: str
) -> None:
    if not os.access(path, os.R_OK | os.W_OK):
        pytest.skip(f"no permission for {path}")
    said = refusal(use, f"file:{path}")
    assert f"its file system is {name}, where" in said
    assert "put it on tmpfs" in said


OVERLAY = """
cd "$1" && mkdir lower upper work merged &&
mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged || exit 77
truncate -s 4M merged/region
shift && exec "$@"
"""


def test_an_overlay(place: Path) -> None:
    """Each container that writes to the file would get a copy of its own."""
    script = "import sys, ivsmc; ivsmc.open_device(sys.argv[1])"
    spec = f"file:{place}/merged/region"
    ran = subprocess.run(
        [
            "unshare",
            "--mount",
            "sh",
            "-c",
            OVERLAY,
            "sh",
            place,
            sys.executable,
            "-c",
            script,
            spec,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode == 77 or "unshare failed" in ran.stderr:
        pytest.skip(f"no permission to mount an overlay: {ran.stderr}")
    assert f"ivsmc.exceptions.DeviceError: device {spec}: " in ran.stderr
    assert "its file system is overlayfs, where" in ran.stderr


def test_a_file_without_permission(place: Path) -> None:
    """Root may open all: somebody else must try."""
    file = region_file(place)
    file.chmod(0o600)
    place.parent.chmod(0o711)
    place.chmod(0o711)
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    with running(open_as_nobody, f"file:{file}") as other:
        said = other.receive()
    assert said.startswith(f"device file:{file}: this process has no permission")
    assert "chmod" in said


def open_as_nobody(_here: Here, spec: str) -> str:
    os.setuid(65534)
    return refusal(open_device, spec)


@pytest.fixture
def local(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the private region of this user is to be; it is not there yet."""
    monkeypatch.setenv("IVSMC_LOCAL_DIR", str(place))
    return place / f"ivsmc-{os.getuid()}"


def squat_with_a_link(directory: Path) -> str:
    elsewhere = directory.with_name("elsewhere")
    elsewhere.mkdir(mode=0o700)
    directory.symlink_to(elsewhere)
    return "symbolic links are not followed"


def squat_with_a_file(directory: Path) -> str:
    directory.touch()
    return f"{directory} is not a directory"


def squat_with_open_doors(directory: Path) -> str:
    directory.mkdir()
    directory.chmod(0o777)
    return f'{directory} has mode 0777 and must have 0700; .*"chmod 700 {directory}"'


def squat_as_somebody_else(directory: Path) -> str:
    directory.mkdir(mode=0o700)
    os.chown(directory, 65534, 65534)
    return f"{directory} belongs to user 65534 and not to user {os.getuid()}"


def file_elsewhere(directory: Path) -> Path:
    """A file beside the directory, which is made and right but for its region."""
    directory.mkdir(mode=0o700)
    elsewhere = directory.with_name("elsewhere")
    elsewhere.touch(mode=0o600)
    return elsewhere


def squat_with_a_linked_region(directory: Path) -> str:
    (directory / "region").symlink_to(file_elsewhere(directory))
    return f"{directory}/region is a symbolic link"


def squat_with_a_region_of_two_names(directory: Path) -> str:
    (directory / "region").hardlink_to(file_elsewhere(directory))
    return f"{directory}/region has 2 names"


def squat_with_a_readable_region(directory: Path) -> str:
    directory.mkdir(mode=0o700)
    (directory / "region").touch()
    (directory / "region").chmod(0o644)
    return f'{directory}/region has mode 0644, .*"chmod 600 {directory}/region"'


def squat_with_a_foreign_region(directory: Path) -> str:
    directory.mkdir(mode=0o700)
    (directory / "region").touch(mode=0o600)
    os.chown(directory / "region", 65534, 65534)
    return f"{directory}/region belongs to user 65534"


def squat_with_a_directory_as_region(directory: Path) -> str:
    directory.mkdir(mode=0o700)
    (directory / "region").mkdir()
    return f"{directory}/region is a directory"


def squat_with_a_pipe(directory: Path) -> str:
    directory.mkdir(mode=0o700)
    os.mkfifo(directory / "region", 0o600)
    return f"{directory}/region is not a regular file"


@pytest.mark.parametrize(
    "squat",
    [
        squat_with_a_link,
        squat_with_a_file,
        squat_with_open_doors,
        squat_as_somebody_else,
        squat_with_a_linked_region,
        squat_with_a_region_of_two_names,
        squat_with_a_readable_region,
        squat_with_a_foreign_region,
        squat_with_a_directory_as_region,
        squat_with_a_pipe,
    ],
)
def test_a_squatted_place_of_the_local_region(
    use: Callable[[str], None], local: Path, squat: Callable[[Path], str]
) -> None:
    try:
        said = squat(local)
    except PermissionError:
        pytest.skip("only root can give files away")
    before = listing(local.parent)
    with pytest.raises(ivsmc.DeviceError, match=said):
        use("local")
    assert listing(local.parent) == before


def listing(place: Path) -> list[tuple[str, int, int, int]]:
    """What is below ``place``, as far as somebody could have changed it."""
    found = []
    for path in sorted(place.rglob("*")):
        status = path.lstat()
        found.append((str(path), status.st_mode, status.st_uid, status.st_size))
    return found


def test_squatted_and_not_asked_for_it_is_named_as_the_reason(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.touch()
    monkeypatch.setenv("IVSMC_DEVICE", "local")
    with ivsmc.create_server(LOOPBACK) as listener:
        with ivsmc.create_connection(listener.getsockname()) as session:
            assert session.transport == "tcp"
            reason = session.fallback_reason
            assert reason is not None
            assert (reason.name, reason.side) == ("LOCAL_UNSAFE", "local")
            assert f"{local} is not a directory" in reason.sentence
            listener.accept()[0].close()
    (found,) = ivsmc.devices()
    assert (found["spec"], found["usable"]) == ("local", False)
    assert f"{local} is not a directory" in found["reason"]


def test_a_place_of_the_local_region_that_is_not_there(
    use: Callable[[str], None], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVSMC_LOCAL_DIR", str(local / "not" / "there"))
    said = refusal(use, "local")
    assert f"{local}/not/there/ivsmc-{os.getuid()} cannot be made" in said
    assert "IVSMC_LOCAL_DIR" in said


@pytest.mark.parametrize("size", ["", "tiny", "1", "-4M", "4T", "1000G0"])
def test_a_size_of_the_local_region_that_is_none(
    use: Callable[[str], None], local: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IVSMC_LOCAL_SIZE", size)
    said = refusal(use, "local")
    assert f'IVSMC_LOCAL_SIZE is "{size}"' in said
    assert not local.exists()


def hold_the_region(here: Here) -> None:
    with contextlib.closing(ivsmc.open_device("local")):
        here.send("here")
        here.receive()


@pytest.mark.parametrize("first", [0, 1], ids=["as they came", "in reverse"])
def test_the_last_one_gives_the_local_memory_back(local: Path, first: int) -> None:
    region = local / "region"
    with running(hold_the_region) as one:
        assert one.receive() == "here"
        identity = region.stat().st_ino
        with running(hold_the_region) as two:
            assert two.receive() == "here"
            both = [one, two]
            leaver, stayer = both[first], both[1 - first]
            leaver.send("leave")
            leaver.receive()
            leaver.process.join()
            assert region.stat().st_ino == identity
            stayer.send("leave")
            stayer.receive()
            stayer.process.join()
            assert not local.exists()


def test_the_last_one_gives_back_what_a_killed_one_left(local: Path) -> None:
    with running(hold_the_region) as killed:
        assert killed.receive() == "here"
        killed.kill()
    assert (local / "region").exists()
    open_device("local")
    ivsmc._native.shutdown()
    assert not local.exists()


Serve = Callable[[socket.socket], object]


@contextlib.contextmanager
def unix_listener(path: Path, serve: Serve) -> Iterator[None]:
    """Something else than an ivshmem server on the socket ``path``, for any number of clients."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        clients: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    clients.append(client)
                    with contextlib.suppress(OSError):
                        serve(client)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in clients:
                client.close()


def message(value: int) -> bytes:
    return struct.pack("<q", value)


def welcome(client: socket.socket, region: int | None) -> None:
    """Speak as an ivshmem server does, with ``region`` as the region's descriptor."""
    client.sendall(message(0))
    client.sendall(message(5))
    if region is None:
        client.sendall(message(-1))
    else:
        socket.send_fds(client, [message(-1)], [region])


def send_pipe(client: socket.socket) -> None:
    ends = os.pipe()
    welcome(client, ends[0])
    for end in ends:
        os.close(end)


def send_memory(size: int, content: bytes = b"") -> Serve:
    def send(client: socket.socket) -> None:
        memory = os.memfd_create("not-a-region")
        os.ftruncate(memory, size)
        os.pwrite(memory, content, 0)
        welcome(client, memory)
        os.close(memory)

    return send


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        (lambda client: client.sendall(b"220 mail.example ESMTP\r\n"), "not an ivshmem server"),
        (lambda client: client.sendall(os.urandom(4096)), "not an ivshmem server"),
        (lambda client: client.shutdown(socket.SHUT_RDWR), "ended the connection before"),
        (lambda client: client.sendall(message(1)), "not protocol version 0"),
        (lambda client: welcome(client, None), "not an ivshmem server"),
        (send_pipe, "is not a file"),
        (send_memory(4096), "too small"),
        (send_memory(MIB, b"something else"), "not an ivsmc region"),
    ],
    ids=[
        "text",
        "noise",
        "an end",
        "another version",
        "no descriptor",
        "a pipe",
        "a small file",
        "a foreign file",
    ],
)
def test_a_socket_that_is_no_ivshmem_server(
    use: Callable[[str], None], place: Path, serve: Serve, said: str
) -> None:
    path = place / "ivs.sock"
    with unix_listener(path, serve):
        assert said in refusal(use, f"host:{path}")


@pytest.mark.parametrize("said", [b"", message(0)[:3]], ids=["silence", "a part"])
def test_a_socket_that_says_too_little(place: Path, said: bytes) -> None:
    path = place / "ivs.sock"
    with unix_listener(path, lambda client: client.sendall(said)):
        assert "has not sent a region in time" in refusal(open_device, f"host:{path}")


def test_sockets_that_nobody_serves(use: Callable[[str], None], place: Path) -> None:
    path = place / "ivs.sock"
    assert "there is no such socket" in refusal(use, f"host:{path}")
    look_anew()
    path.touch()
    assert "nobody listens at this path" in refusal(use, f"host:{path}")
    look_anew()
    path.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    assert "nobody listens at this path" in refusal(use, f"host:{path}")
    assert "path" in refusal(use, f"host:{place}/{'x' * 200}")


def test_several_devices_of_which_one_is_bad(device_specs: dict[str, str], place: Path) -> None:
    bad = f"file:{place}/region"
    with pytest.raises(ivsmc.DeviceError, match=bad):
        ivsmc.create_server(LOOPBACK, device=f"{device_specs['file']},{bad}")


def test_a_port_in_use(device: str) -> None:
    with socket.create_server(LOOPBACK) as listener:
        address = listener.getsockname()
        with pytest.raises(OSError, match=f"bind on address .*{address[1]}") as caught:
            ivsmc.create_server(address, device=device)
        assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    "arguments",
    [
        {"address": ("192.0.2.1", 0)},
        {"address": ("256.1.1.1", 0)},
        {"address": ("127.0.0.1", 65536)},
        {"address": ("127.0.0.1", -1)},
        {"address": ("127.0.0.1", "http?")},
        {"address": ("127.0.0.1",)},
        {"address": ("::1", 0)},
        {"address": LOOPBACK, "family": socket.AF_UNIX},
        {"address": LOOPBACK, "family": -5},
        {"address": LOOPBACK, "backlog": "many"},
        {"address": LOOPBACK, "backlog": 1 << 40},
        {"address": LOOPBACK, "dualstack_ipv6": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:unclosed <socket")  # the standard library forgets them
def test_listening_where_a_socket_cannot(arguments: dict[str, Any]) -> None:
    agree(socket.create_server, ivsmc.create_server, arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"address": "127.0.0.1:80"},
        {"address": 80},
        {"address": ("127.0.0.1", "http?")},
        {"address": ("127.0.0.1", -1)},
        {"address": ("no.such.name.invalid", 80)},
        {"address": ("127.0.0.1", 9), "timeout": -1},
        {"address": ("127.0.0.1", 9), "timeout": float("nan")},
        {"address": ("127.0.0.1", 9), "timeout": "soon"},
        {"address": ("127.0.0.1", 9), "source_address": ("192.0.2.1", 0)},
        {"address": ("127.0.0.1", 9), "source_address": ("127.0.0.1", 65536)},
        {"address": ("127.0.0.1", 9), "source_address": ("127.0.0.1", "http")},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:unclosed <socket")  # the standard library forgets them
def test_connecting_where_a_socket_cannot(arguments: dict[str, Any]) -> None:
    agree(socket.create_connection, ivsmc.create_connection, arguments)


def agree(
    expected: Callable[..., Any], ours: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    """Both raise the same."""
    with pytest.raises((OSError, ValueError, TypeError, OverflowError)) as of_socket:
        expected(**arguments)
    with pytest.raises(type(of_socket.value)) as caught:
        ours(**arguments)
    assert getattr(caught.value, "errno", None) == getattr(of_socket.value, "errno", None)


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": 5},
        {"device": b"local"},
        {"require": "tcp"},
        {"require": True},
        {"buffer": 0},
        {"buffer": -1},
        {"buffer": "large"},
        {"buffer": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [ivsmc.create_server, ivsmc.create_connection])
def test_arguments_that_only_ivsmc_has(make: Callable[..., Any], arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with socket.create_server(LOOPBACK) as listener:
        address = LOOPBACK if make is ivsmc.create_server else listener.getsockname()
        with pytest.raises((TypeError, ValueError), match=name):
            make(address, **arguments)


@pytest.mark.parametrize("value", ["50us", "-1", "1.5"])
@pytest.mark.parametrize("name", ["IVSMC_SPIN_US", "IVSMC_MATCH_MS"])
def test_a_variable_that_is_no_number(name: str, value: str) -> None:
    code = "import ivsmc; ivsmc.create_server(('127.0.0.1', 0))"
    environment = {**os.environ, name: value}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert f"{name}={value} is no number" in done.stderr
    assert "OSError" in done.stderr


@pytest.mark.parametrize(
    "call", ["recv", "recv_into", "recvmsg", "recvmsg_into", "send", "sendall"]
)
@pytest.mark.parametrize(
    "argument",
    [None, "text", -1, 1.5, [b"bytes"], array.array("i", [1, -1]), object(), b""],
    ids=str,
)
def test_arguments_of_the_wrong_type(device: str, call: str, argument: Any) -> None:
    """As a socket: the same exception, and then the session works on."""
    with contextlib.ExitStack() as ends:
        pairs: list[tuple[Endpoint, Endpoint]] = [socket.socketpair(), session_pair(device)]
        for near, far in pairs:
            ends.enter_context(near)
            ends.enter_context(far)
            far.sendall(b"there")
            near.settimeout(10)
            far.settimeout(10)
        outcomes = [outcome(getattr(near, call), argument) for near, _ in pairs]
        assert outcomes[0] == outcomes[1]
        near, far = pairs[1]
        near.sendall(b"works")
        assert b"works" in far.recv(64) + b""


def outcome(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except (TypeError, ValueError, BufferError) as error:
        return type(error)


def test_everything_is_refused_once_closed(device: str) -> None:
    near, far = session_pair(device)
    far.close()
    near.close()
    refused: list[Callable[[], Any]] = [
        lambda: near.send(b"x"),
        lambda: near.sendall(b"x"),
        lambda: near.sendmsg([b"x"]),
        lambda: near.recv(1),
        lambda: near.recv_into(bytearray(1)),
        lambda: near.recvmsg(1),
        lambda: near.recvmsg_into([bytearray(1)]),
        lambda: near.shutdown(socket.SHUT_RDWR),
        near.getpeername,
        near.getsockname,
        lambda: near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        lambda: near.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    for call in refused:
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF
    assert near.fileno() == -1
    near.close()


def test_everything_is_refused_of_a_closed_device(device_specs: dict[str, str]) -> None:
    device = ivsmc.open_device(device_specs["file"])
    device.close()
    device.close()
    for call in (device.census, device.stats, device.reap):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_nothing_of_a_refused_server_is_left(place: Path) -> None:
    path = place / "ivs.sock"
    refused: list[dict[str, Any]] = [
        {"size": 1000, "vectors": 1},
        {"size": MIB, "vectors": -1},
        {"size": MIB, "vectors": 1 << 20},
        {"size": MIB, "vectors": 1, "file": str(place)},
        {"size": MIB, "vectors": 1, "file": "/proc/self/comm"},
    ]
    for arguments in refused:
        with pytest.raises((ivsmc.DeviceError, ValueError, OverflowError)):
            ivsmc.Server(str(path), **arguments)
        assert list(place.iterdir()) == []
    path.write_text("somebody's")
    with pytest.raises(ivsmc.DeviceError, match=str(path)):
        ivsmc.Server(str(path), size=MIB, vectors=1)
    assert path.read_text() == "somebody's"
    assert stat.S_ISREG(path.stat().st_mode)
