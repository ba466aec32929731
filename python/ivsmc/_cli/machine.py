"""The machine as commands see and change it: files below a root, and programs.

Everything that differs between a machine and a test goes through here, so that the commands run
on a directory tree that a test has made.
"""

import errno
import os
import shutil
import subprocess
from pathlib import Path

__all__ = ["Machine", "Refused"]


_PATIENCE = 30.0
"""Seconds a program may take."""


class Refused(OSError):
    """A command does not do what it was asked; the text names cause and cure."""


class Machine:
    """Files and programs of a machine; paths are absolute, ``root`` goes before them."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def at(self, path: str) -> Path:
        """Return where ``path`` really is."""
        return self.root / path.lstrip("/")

    def exists(self, path: str) -> bool:
        """Whether there is something at ``path``."""
        return self.at(path).exists()

    def read(self, path: str) -> str | None:
        """Return the text of a file without white space around it; None if it cannot be read."""
        try:
            return self.at(path).read_text(errors="replace").strip()
        except OSError:
            return None

    def read_bytes(self, path: str) -> bytes:
        """Return the contents of a file; nothing if it cannot be read."""
        try:
            return self.at(path).read_bytes()
        except OSError:
            return b""

    def names(self, path: str) -> list[str]:
        """Return what is in a directory, sorted; nothing if there is none."""
        try:
            return sorted(entry.name for entry in self.at(path).iterdir())
        except OSError:
            return []

    def target(self, path: str) -> str | None:
        """Return the last name of what a symbolic link leads to; None if there is none."""
        try:
            return self.at(path).readlink().name
        except OSError:
            return None

    def write(self, path: str, text: str) -> None:
        """Write to a file of the kernel: one ``write``, nothing is created."""
        fd = os.open(self.at(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def chgrp(self, path: str, gid: int) -> None:
        """Give a file to a group."""
        os.chown(self.at(path), -1, gid)

    def chmod(self, path: str, mode: int) -> None:
        """Set the permissions of a file."""
        self.at(path).chmod(mode)

    def is_usable(self, path: str) -> bool:
        """Whether this process may read and write ``path``."""
        return os.access(self.at(path), os.R_OK | os.W_OK)

    def is_root(self) -> bool:
        """Whether this process may change what is root's."""
        return os.geteuid() == 0

    def is_busy(self, path: str) -> bool:
        """Whether the device node ``path``, which opens only once, is open somewhere."""
        try:
            os.close(os.open(self.at(path), os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return error.errno == errno.EBUSY
        return False

    def modprobe(self, module: str) -> None:
        """Load a kernel module; do nothing if it is there."""
        self.run("modprobe", module)

    def reload_udev(self) -> None:
        """Have udev read its rules again."""
        self.run("udevadm", "control", "--reload")

    def find(self, program: str) -> str | None:
        """Return the path of a program, also where only root looks for it."""
        places = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin:/usr/libexec"
        return shutil.which(program, path=places)

    def run(self, program: str, *arguments: str) -> str:
        """Run a program; return what it printed. Raises ``Refused`` with what it complained of."""
        path = self.find(program)
        if path is None:
            raise Refused(f"{program} is not installed")
        try:
            result = subprocess.run(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            raise Refused(f"{program} took more than {_PATIENCE:.0f} s") from None
        if result.returncode:
            raise Refused((result.stderr or result.stdout).strip() or f"{program} failed")
        return result.stdout
