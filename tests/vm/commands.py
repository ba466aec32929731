"""What the tests of commands have done in a guest."""

import grp
import os
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

from processes import Here
from vm import tasks


def status_of(command: list[str]) -> tuple[int, str, str]:
    """Run a command; return its status and what it says."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def hold_open(here: Here, path: str) -> None:
    """Keep the file ``path`` open until told otherwise."""
    with open(path, "r+b", buffering=0):
        here.send("open")
        here.receive()


class Given(NamedTuple):
    """To whom a device is given."""

    driver: str | None
    group: str
    mode: int


def come_anew(device: str, path: str) -> Given:
    """Take a device from its users, who have it through ``path``; have udev see it come."""
    place = Path("/sys/bus/pci/devices", device)
    driver = place / "driver"
    file = Path(path)
    if driver.exists():
        (place / "driver_override").write_text("\n")
        (driver / "unbind").write_text(device)
        assert not file.exists()
    else:
        os.chown(file, 0, 0)
        file.chmod(0o600)
    tasks.run("udevadm", "trigger", "--action=add", str(place))
    tasks.run("udevadm", "settle")
    status = file.stat()
    return Given(
        driver.readlink().name if driver.exists() else None,
        grp.getgrgid(status.st_gid).gr_name,
        stat.S_IMODE(status.st_mode),
    )
