"""Forked children of tests, and what they find out."""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ivsmc import _native

ignore_threads = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
"""Python 3.12 and later warn of every fork with threads, and the background is always one."""


class Child:
    """A forked child of this process."""

    def __init__(self, pid: int, results: int) -> None:
        self.pid = pid
        self._results = results

    def result(self) -> Any:
        """What its function returned; fails with its traceback if it failed."""
        with os.fdopen(self._results, "rb", closefd=False) as results:
            failed, value = pickle.load(results)
        assert not failed, value
        return value

    def join(self) -> None:
        """See it end well."""
        os.close(self._results)
        _, status = os.waitpid(self.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


@contextmanager
def forked(function: Callable[..., Any], *arguments: object) -> Iterator[Child]:
    """Run ``function(*arguments)`` in a forked child, which then leaves its regions and exits."""
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                outcome = (False, function(*arguments))
            except BaseException:
                outcome = (True, traceback.format_exc())
            _native.shutdown()
            os.write(theirs, pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.close(theirs)
    child = Child(pid, ours)
    try:
        yield child
    except BaseException:
        os.kill(pid, signal.SIGKILL)  # it may wait for us
        os.waitpid(pid, 0)
        raise
    child.join()
