"""The native module: sessions, listeners and devices without the standard library's shapes.

Private: use the package ``ivsmc``. Exceptions are those of the socket module, or those of
``ivsmc.exceptions``. Timeouts are seconds; None waits for ever, 0.0 does not wait.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Self, final, overload

from _typeshed import ReadableBuffer, WriteableBuffer
from typing_extensions import disjoint_base

__all__ = [
    "Acceptor",
    "Agent",
    "Device",
    "Fallback",
    "Handle",
    "Server",
    "Stream",
    "bare_limit",
    "connect",
    "devices",
    "open_device",
    "set_match_wait",
    "set_spin",
    "shutdown",
]

@final
class Handle:
    """A connection that is set up and not yet a ``Stream``; dropping it closes it."""

@final
class Fallback:
    """Why a session goes over TCP."""

    @property
    def name(self) -> str:
        """Stable name, such as ``PEER_NO_SMC``."""
    @property
    def code(self) -> int:
        """SMC's diagnosis code; the peer's own where it declined."""
    @property
    def sentence(self) -> str:
        """One sentence for people; names the regions that were looked at."""
    @property
    def side(self) -> Literal["local", "peer"]:
        """Whose side it was."""

def connect(
    family: int,
    address: tuple[Any, ...],
    timeout: float | None,
    source: tuple[Any, ...] | None,
    device: str | None,
    require: str | None,
    buffer: int | None,
) -> Handle:
    """Connect to one numeric address: TCP, then the handshake, or plain TCP.

    Raises what a socket's ``connect`` raises (``TimeoutError`` after ``timeout`` seconds), and
    ``SMCRequired`` where ``require`` is "smc" and it would be plain TCP.
    """

@disjoint_base
class Stream:
    """A connected stream; the methods are those of ``socket.socket``.

    One thread may send while another receives. After ``fork()`` every method raises
    ``ForkedSession`` in the child.
    """

    def __new__(cls, handle: Handle) -> Stream:
        """Take over ``handle``; it cannot be used twice. Blocks without a timeout at first."""
    @property
    def family(self) -> int:
        """Address family of the TCP connection."""
    @property
    def type(self) -> int:
        """``SOCK_STREAM``."""
    @property
    def proto(self) -> int:
        """``IPPROTO_TCP``."""
    @property
    def timeout(self) -> float | None:
        """Seconds a call waits."""
    @property
    def closed(self) -> bool:
        """Whether the stream is closed."""
    @property
    def transport(self) -> Literal["smc", "tcp"]:
        """What the bytes go through: shared memory or TCP."""
    @property
    def fallback_reason(self) -> Fallback | None:
        """Why it is TCP; None on shared memory."""
    def stats(self) -> dict[str, Any]:
        """Return counters: bytes each way, wakes by TCP and doorbell, waits, buffer sizes, device.

        ``wakes_sent`` and ``wakes_received`` count bytes on the TCP connection that woke the other
        end, or this one; ``doorbells_sent`` and ``doorbells_received`` doorbells. One received may
        be about another session: a process has one for all, with 1,024 bits to tell them apart.
        """
    def send(self, data: ReadableBuffer, flags: int = 0, /) -> int:
        """Send some of ``data``; return the bytes taken."""
    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """Send all of ``data``; the timeout is for the whole call."""
    def sendmsg(
        self,
        buffers: Iterable[ReadableBuffer],
        ancdata: Iterable[Any] | None = None,
        flags: int = 0,
        address: Any = None,
        /,
    ) -> int:
        """Send some of ``buffers``, in order; return the bytes taken. ``ancdata`` must be empty."""
    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive up to ``bufsize`` bytes; empty at the end of the stream.

        Flags: ``MSG_PEEK``, ``MSG_DONTWAIT``, ``MSG_WAITALL``. ``MSG_OOB`` is refused.
        """
    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into ``buffer``, at most ``nbytes`` (0: all of it); return the bytes written."""
    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[Any], int, Any]:
        """Receive as ``recv``; return (data, no ancillary data, flags, None)."""
    def recvmsg_into(
        self, buffers: Iterable[WriteableBuffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[Any], int, Any]:
        """Receive into ``buffers`` in order; return (bytes, no ancillary data, flags, None)."""
    def shutdown(self, how: int, /) -> None:
        """End one direction or both: ``SHUT_RD``, ``SHUT_WR``, ``SHUT_RDWR``."""
    def settimeout(self, value: float | None, /) -> None:
        """Set the seconds a call waits."""
    def gettimeout(self) -> float | None:
        """Return the seconds a call waits."""
    def setblocking(self, flag: bool, /) -> None:
        """Wait for ever, or not at all."""
    def getblocking(self) -> bool:
        """Whether calls wait."""
    def fileno(self) -> int:
        """Return a descriptor that tells readiness (poll, level-triggered); -1 when closed.

        It carries no data: never read from it or write to it.
        """
    def getpeername(self) -> Any:
        """Return the peer's address."""
    def getsockname(self) -> Any:
        """Return the own address."""
    @overload
    def getsockopt(self, level: int, option: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, option: int, buflen: int, /) -> bytes: ...
    @overload
    def setsockopt(
        self, level: int, option: int, value: int | ReadableBuffer, optlen: None = None, /
    ) -> None: ...
    @overload
    def setsockopt(self, level: int, option: int, value: None, optlen: int, /) -> None: ...
    def _close(self) -> None:
        """Close; a thread inside another call gets an error and is waited for. Idempotent."""

@final
class Acceptor:
    """A listening TCP socket and its entry in every region's directory."""

    def __new__(
        cls,
        fd: int,
        backlog: int,
        shared: bool,
        device: str | None,
        require: str | None,
        buffer: int | None,
    ) -> Acceptor:
        """Take over ``fd``, a listening TCP socket, also when this raises.

        ``shared``: other processes may accept from it too, so hold at most one connection.
        """
    @property
    def family(self) -> int:
        """``AF_INET`` or ``AF_INET6``."""
    @property
    def closed(self) -> bool:
        """Whether it is closed."""
    def accept(self, timeout: float | None, /) -> tuple[Handle, Any]:
        """Wait for a connection that is set up; return it and the client's address."""
    def fileno(self) -> int:
        """Return a descriptor that is readable while ``accept`` would not wait; -1 when closed."""
    def getsockname(self) -> Any:
        """Return the address listened on."""
    def getsockopt(self, level: int, option: int, buflen: int = 0, /) -> int | bytes:
        """Read an option of the listening socket."""
    def setsockopt(
        self,
        level: int,
        option: int,
        value: int | ReadableBuffer | None,
        optlen: int | None = None,
        /,
    ) -> None:
        """Set an option of the listening socket."""
    def stats(self) -> dict[str, Any]:
        """Return counters: accepted over each transport, handshakes and sessions in hand."""
    def close(self) -> None:
        """Stop listening and leave the directories. Idempotent."""

def devices() -> list[dict[str, Any]]:
    """Return what is found here, one dict a device.

    Keys: ``spec``, ``kind``, ``usable``, ``reason`` (why not, else None), and for a usable one
    ``region`` (uuid), ``size`` in bytes, ``slot``, ``peers``, ``memory`` and ``memory_ratio``: of
    a guest's device "write-back" or "uncached", with how many times slower its slowest kind of
    access was than in ordinary memory; else None.
    """

def open_device(spec: str, /) -> Device:
    """Attach to the device of ``spec`` now, rather than at the first connect or listen.

    Raises ``DeviceError`` or ``RegionError``, naming the cure.
    """

@final
class Device:
    """One device this process is attached to."""

    @property
    def spec(self) -> str:
        """The spec, as given to ``open_device``."""
    @property
    def kind(self) -> str:
        """``vfio``, ``agent``, ``host``, ``pci``, ``local`` or ``file``."""
    def stats(self) -> dict[str, Any]:
        """Return counters of this process's attachment.

        ``vector`` is the one on which its doorbell is notified, None if the device has none;
        ``doorbells_lost`` counts those that only the look every half second has found,
        ``departures`` the peers whose end a doorbell has told; ``memory`` is as ``devices`` has it.
        """
    def census(self) -> dict[str, int]:
        """Return what is in use in the region: slots, listeners, intents, extents, DMBs."""
    def reap(self) -> int:
        """Look for dead peers now, take back what they had; return how many there were."""
    def slots(self) -> list[dict[str, Any]]:
        """Return the peer slots that are in use, one dict each.

        Keys: ``slot`` ("index.generation"), ``index``, ``generation``, ``state`` ("live", or
        "dead": being reclaimed), ``own`` (this process's), ``prover`` (who may say that it is dead:
        "lock", "ivposition", "agent", "vfio" or "none") with ``prover_id``, ``ivposition`` and
        ``vector`` (None without), ``same_boot`` and ``same_machine`` (as this process; None if
        that is not known), ``addresses`` of its host.
        """
    def declare_dead(self, slot: str, /) -> bool:
        """Declare the slot "index.generation" dead and take back what its owner had.

        Return whether it was in use. For an operator who knows that its owner will never write to
        the region again: if it does, it writes into memory of others. Raises ``OSError`` for what
        is no slot, or this process's own.
        """
    def close(self) -> None:
        """Let go of the device; the attachment ends with its last session. Idempotent."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class Server:
    """An ivshmem server, speaking QEMU's protocol on the Unix socket ``path``.

    It listens from its construction on. ``size`` is the region's in bytes, ``vectors`` the
    interrupts of each peer, ``file`` the file that holds the region (None: anonymous memory),
    ``mode`` and ``group`` (a number) of the socket decide who may join. With ``state``, whoever is
    at ``$NOTIFY_SOCKET`` keeps what the next one needs to go on with the same clients (systemd's
    descriptor store, or ``ivsmc server --state``).
    """

    def __new__(
        cls,
        path: str,
        *,
        size: int,
        vectors: int,
        file: str | None = None,
        mode: int = 0o600,
        group: int | None = None,
        state: bool = False,
    ) -> Server: ...
    def serve(self, poll: float, /, log: Callable[[str], object] | None = None) -> None:
        """Serve clients for at most ``poll`` seconds, running signal handlers; then return.

        ``log`` is called with one line for each client that joins, leaves or is turned away.
        """
    def status(self) -> dict[str, Any]:
        """Return path, region, size, vectors, the clients and how many came and went."""
    def close(self, *, keep: bool = False) -> None:
        """Stop: drop the clients and remove the socket. Idempotent.

        If ``keep`` and somebody keeps its state, leave both to the next one instead.
        """
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

@final
class Agent:
    """The owner of an ivshmem device of this virtual machine, for the machine's processes.

    It takes the device at the PCI ``address``, or the only one that is bound to vfio-pci, and
    listens on the Unix socket ``path`` (None: where clients find it) from its construction on.
    ``mode`` and ``group`` (a number) of the socket decide who may use the device.
    """

    def __new__(
        cls,
        address: str | None = None,
        *,
        path: str | None = None,
        mode: int = 0o600,
        group: int | None = None,
    ) -> Agent: ...
    def serve(self, poll: float, /, log: Callable[[str], object] | None = None) -> None:
        """Serve clients for at most ``poll`` seconds, running signal handlers; then return.

        ``log`` is called with one line for each client that joins, leaves, dies or is turned away.
        """
    def status(self) -> dict[str, Any]:
        """Return path, device, region, size, vectors, the clients and how many came and went."""
    def close(self) -> None:
        """Stop: remove the socket. Clients keep the device. Idempotent."""
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exception: object) -> None: ...

def shutdown() -> bool:
    """Leave every region if nothing is open; return whether that is so. A later connect returns."""

def bare_limit(cores: tuple[int, int], round_trips: int, size: int, /) -> tuple[float, float]:
    """Measure what the machine allows between two processors, with two threads that spin.

    Return the microseconds of a word there and back, and the bytes per second of ``size`` bytes
    copied into one ring and out again.
    """

def set_spin(microseconds: int | None, /) -> None:
    """Set how long each wait of this process looks before it sleeps, from now on.

    None is what the environment says. For measuring both ways in one run.
    """

def set_match_wait(milliseconds: int | None, /) -> None:
    """Set how long each connect waits for a listener that is there, from now on.

    None is what the environment says. A listener waits for its clients four times as long.
    """
