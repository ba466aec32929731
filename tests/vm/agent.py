"""Run functions of the tests in this machine, each in a process of its own, for pytest outside.

``agent.py CHANNEL``, where CHANNEL is a descriptor's number or the path of a virtio-serial port.
The agent is one thread, so it may fork; what its jobs need is imported before. It ends with its
channel, and as it is the first process of its machine (of a guest's script, or of a namespace of
processes), everything that runs there ends with it.
"""

import multiprocessing
import os
import pickle
import selectors
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import ivsmc.asyncio  # noqa: F401 - slow to import in a guest, so once for all jobs
import processes
import random_stream  # noqa: F401
from ivsmc import _native
from vm import tasks  # noqa: F401
from vm.frames import Decoder, Frame, Kind, encode


class Agent:
    """Starts jobs and carries their values to and from the channel."""

    def __init__(self, channel: int) -> None:
        self._channel = channel
        self._decoder = Decoder()
        self._selector = selectors.DefaultSelector()
        self._jobs: dict[int, Job] = {}

    def serve(self) -> None:
        """Run until the channel ends."""
        self._selector.register(self._channel, selectors.EVENT_READ, self._receive)
        self._send(Kind.READY)
        while True:
            for key, _ in self._selector.select():
                handle: Callable[[], None] = key.data
                try:
                    handle()
                except EOFError:
                    return

    def _send(self, kind: Kind, job: int = 0, body: bytes = b"") -> None:
        data = encode(kind, job, body)
        while data:
            data = data[os.write(self._channel, data) :]

    def _receive(self) -> None:
        data = os.read(self._channel, 65536)
        if not data:
            raise EOFError
        for frame in self._decoder.feed(data):
            if frame.kind is Kind.START:
                self._start(frame)
            elif (job := self._jobs.get(frame.job)) is None:
                pass  # it has ended meanwhile
            elif frame.kind is Kind.DATA:
                job.pipe.send_bytes(frame.body)
            elif frame.kind is Kind.KILL:
                os.killpg(job.process, signal.SIGKILL)

    def _start(self, frame: Frame) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = os.fork()
        if process == 0:
            os.setpgid(0, 0)
            ours.close()
            self._leave()
            _run(theirs, frame.body)
        theirs.close()
        os.setpgid(process, process)  # in both, so that it is so whoever comes first
        job = Job(frame.job, process, ours)
        self._jobs[frame.job] = job
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._relay(job))
        self._selector.register(job.end, selectors.EVENT_READ, lambda: self._ended(job))

    def _leave(self) -> None:
        """Let go, in a job's process, of what is the agent's."""
        self._selector.close()
        os.close(self._channel)
        for job in self._jobs.values():
            job.close()

    def _relay(self, job: "Job") -> None:
        try:
            value = job.pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            self._selector.unregister(job.pipe)
            job.pipe.close()
        else:
            self._send(Kind.DATA, job.number, value)

    def _ended(self, job: "Job") -> None:
        while not job.pipe.closed and job.pipe.poll():
            self._relay(job)
        if not job.pipe.closed:
            self._selector.unregister(job.pipe)
        self._selector.unregister(job.end)
        job.close()
        del self._jobs[job.number]
        _, status = os.waitpid(job.process, 0)
        code = os.waitstatus_to_exitcode(status)
        self._send(Kind.EXITED, job.number, str(code).encode())


class Job:
    """A process that runs one function."""

    def __init__(self, number: int, process: int, pipe: Connection) -> None:
        self.number = number
        self.process = process
        self.pipe = pipe
        self.end = os.pidfd_open(process)

    def close(self) -> None:
        self.pipe.close()
        os.close(self.end)


def _run(pipe: Connection, body: bytes) -> None:
    status = 1
    try:
        function, arguments = pickle.loads(body)
        processes.serve(pipe, function, arguments)
        _native.shutdown()  # as at the end of any program
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    [place] = sys.argv[1:]
    # Python's way of opening would look for an end that a port does not have.
    Agent(int(place) if place.isdecimal() else os.open(place, os.O_RDWR)).serve()
