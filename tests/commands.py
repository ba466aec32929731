"""The command line in a process of its own, or in this one."""

import argparse
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ivsmc._cli import bind, qemu_args, xml

IVSMC = [sys.executable, "-W", "error", "-m", "ivsmc"]


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``ivsmc`` with ``arguments``; warnings are errors."""
    return subprocess.run(
        [*IVSMC, *arguments], capture_output=True, text=True, check=False, **options
    )


def run_here(*arguments: str) -> int:
    """Run one of some commands in this process; what it is refused is raised."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for module in (bind, qemu_args, xml):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    return int(options.run(options))


@contextlib.contextmanager
def listening(port: int, *options: str) -> Iterator[list[str]]:
    """``ivsmc bench --listen`` on ``port``; yields what it says, complete at the end."""
    arguments = [*IVSMC, "bench", "--listen", f"127.0.0.1:{port}", *options]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = [process.stderr.readline()]
        reader = threading.Thread(target=said.extend, args=(process.stderr,))
        reader.start()
        try:
            assert said == [f"ivsmc bench: listening on 127.0.0.1:{port}\n"]
            yield said
        finally:
            process.terminate()
            reader.join()
    assert process.returncode == 0, said
