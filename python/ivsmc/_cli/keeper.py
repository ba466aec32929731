"""Keeps the state of an ivshmem server that runs in a process of its own, and starts it anew.

Where there is no systemd: the other side of its descriptor store (``sd_notify(3)``,
``sd_listen_fds(3)``). This process does so little that it does not end by itself:

* descriptors that the ivshmem server sends with ``FDSTORE=1`` it keeps, by ``FDNAME``;
* when that process ends, it gives them to the next one, as ``LISTEN_FDS``. One that ends
  properly has everything removed, and is not followed by another;
* SIGTERM and SIGINT end both properly, SIGHUP has another one begin (a new version, for instance).
"""

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_SPARE_DESCRIPTORS = 64
"""Of the limit: what both processes have open besides what is kept."""
_FIRST = 3
"""The first descriptor that a process is given, as ``sd_listen_fds(3)`` has it."""
_LARGEST_MESSAGE = 4096
_CREDENTIALS = struct.Struct("iII")
_LONGEST_PAUSE = 5.0
"""Seconds between two starts, where one fails after the other."""


def keep(command: Sequence[str], log: Callable[[str], None]) -> int:
    """Run ``command``, which serves, until it ends properly or a signal says so; its status."""
    with contextlib.ExitStack() as cleanup:
        return _Keeper(command, log, cleanup).run()


class _Keeper:
    def __init__(
        self, command: Sequence[str], log: Callable[[str], None], cleanup: contextlib.ExitStack
    ) -> None:
        self._command = list(command)
        self._log = log
        self._kept: dict[str, int] = {}
        self._child = 0
        self._is_ready = False
        """Of the child: it serves."""
        self._is_told = False
        """Of the child: it knows that both are to end."""
        self._was_ready = False
        """Of any child so far."""
        self._is_ending = False
        """Both are to end."""
        self._is_replacing = False
        """Another child is to begin."""
        self._pause = 0.0
        self._wakeup, theirs = socket.socketpair()
        for end in (self._wakeup, theirs):
            cleanup.enter_context(end).setblocking(False)
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        cleanup.callback(signal.set_wakeup_fd, before)
        for number in _SIGNALS:
            cleanup.callback(signal.signal, number, signal.signal(number, self._on_signal))

    def run(self) -> int:
        while True:
            self._is_ready = self._is_told = self._is_replacing = False
            how = None
            try:
                ear = self._start()
            except OSError as error:
                # There is no room for a file or a process; there may be again.
                self._log(f"cannot start a process: {error}")
                status = 1
            else:
                with ear:
                    ended = self._attend(ear)
                status = ended if ended >= 0 else 128 - ended
                how = f"by {signal.Signals(-ended).name}" if ended < 0 else f"with status {ended}"
            if not self._kept or not self._was_ready or (self._is_ending and not self._is_ready):
                self._drop_all()
                return status
            if how is not None:
                self._log(f"process {self._child} ended {how}; another one goes on")
            self._wait(self._pause)
            self._pause = min(2 * self._pause + 0.1, _LONGEST_PAUSE)

    def _attend(self, ear: "_Ear") -> int:
        """Hear the child, and tell it to end if a signal says so, until it has; return how."""
        while True:
            self._wait(None, ear)
            # First what signals say, and whether it has ended: what it said before then is heard.
            is_ending, is_replacing = self._is_ending, self._is_replacing
            pid, status = os.waitpid(self._child, os.WNOHANG)
            while (message := ear.hear(self._child)) is not None:
                self._obey(*message)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if self._is_ready and not self._is_told and (is_ending or is_replacing):
                self._is_told = is_ending
                os.kill(self._child, signal.SIGINT if is_ending else signal.SIGTERM)
            if is_replacing:
                # One that only begins is another one already.
                self._is_replacing = False

    def _wait(self, seconds: float | None, *ears: "_Ear") -> None:
        """Wait until a signal comes or something is said, or for so long."""
        _ready(seconds, self._wakeup, *ears)
        with contextlib.suppress(BlockingIOError):
            while self._wakeup.recv(64):
                pass

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        # No more: the child may be gone, and another process have its number.
        self._is_ending |= number in (signal.SIGTERM, signal.SIGINT)
        self._is_replacing |= number == signal.SIGHUP

    def _obey(self, said: dict[str, str], descriptor: int | None) -> None:
        """Do what one message says."""
        name = said.get("FDNAME", "")
        if said.get("FDSTOREREMOVE") == "1" and name in self._kept:
            os.close(self._kept.pop(name))
        if descriptor is not None:
            unused: int | None = descriptor
            if said.get("FDSTORE") == "1":
                unused = self._kept.get(name)
                self._kept[name] = descriptor
            if unused is not None:
                os.close(unused)
        if said.get("READY") == "1":
            self._is_ready = self._was_ready = True
            self._pause = 0.0

    def _drop_all(self) -> None:
        while self._kept:
            os.close(self._kept.popitem()[1])

    def _start(self) -> "_Ear":
        """Start the program that serves; return where it is heard."""
        with contextlib.ExitStack() as undo:
            ear = undo.enter_context(_Ear())
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            environment = dict(os.environ)
            environment["NOTIFY_SOCKET"] = ear.name
            environment["FDSTORE"] = str(max(limit - _SPARE_DESCRIPTORS, 0))
            environment["LISTEN_FDS"] = str(len(self._kept))
            environment["LISTEN_FDNAMES"] = ":".join(self._kept)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                self._child = os.fork()
                if self._child == 0:
                    self._become(environment, before)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            undo.pop_all()
        return ear

    def _become(self, environment: dict[str, str], mask: Iterable[int]) -> NoReturn:
        """Be the program that serves."""
        try:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            environment["LISTEN_PID"] = str(os.getpid())
            _put(list(self._kept.values()))
            os.execve(self._command[0], self._command, environment)
        except OSError as error:
            self._log(f"cannot start {self._command[0]}: {error}")
        finally:
            os._exit(127)


class _Ear:
    """A socket that one child, which connects at its start, is heard by.

    It has a name of the file system, of this user's only, until the first word: among those beside
    the file system anybody could fill its queue.
    """

    def __init__(self) -> None:
        self._directory: str | None = tempfile.mkdtemp(prefix="ivsmc-state-")
        self.name = f"{self._directory}/notify"
        with contextlib.ExitStack() as undo:
            undo.callback(self._take_name_away)
            self._socket = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.bind(self.name)
            undo.pop_all()

    def __enter__(self) -> "_Ear":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._socket.close()
        self._take_name_away()

    def fileno(self) -> int:
        return self._socket.fileno()

    def hear(self, child: int) -> tuple[dict[str, str], int | None] | None:
        """Return what ``child`` says, and the descriptor that comes with it; None for silence."""
        size = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(struct.calcsize("i"))
        try:
            data, ancillary, _, _ = self._socket.recvmsg(_LARGEST_MESSAGE, size)
        except BlockingIOError:
            return None
        self._take_name_away()
        sender = 0
        descriptor = None
        for _level, kind, value in ancillary:
            if kind == socket.SCM_CREDENTIALS:
                sender, *_ = _CREDENTIALS.unpack(value)
            elif kind == socket.SCM_RIGHTS:
                (descriptor,) = struct.unpack("i", value)
        if sender != child:
            return {}, descriptor
        lines = data.decode(errors="replace").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line), descriptor

    def _take_name_away(self) -> None:
        if self._directory is not None:
            # Whoever tidies up there may have been faster.
            with contextlib.suppress(OSError):
                Path(self.name).unlink(missing_ok=True)
                Path(self._directory).rmdir()
            self._directory = None


def _ready(seconds: float | None, *sources: "_Ear | socket.socket") -> None:
    """Wait until one of ``sources`` is readable, however high its number, or for so long."""
    poll = select.poll()
    for source in sources:
        poll.register(source, select.POLLIN)
    poll.poll(None if seconds is None else seconds * 1000)


def _put(descriptors: list[int]) -> None:
    """Have the next program find ``descriptors`` from 3 on; others with these numbers are lost."""
    places = {descriptor: index for index, descriptor in enumerate(descriptors)}
    for index, descriptor in enumerate(descriptors):
        wanted = _FIRST + index
        places.pop(descriptor)
        if descriptor == wanted:
            os.set_inheritable(wanted, True)
            continue
        if (other := places.pop(wanted, None)) is not None:
            descriptors[other] = os.dup(wanted)
            places[descriptors[other]] = other
        os.dup2(descriptor, wanted)
        os.close(descriptor)
