"""Checks of a machine that runs VMs: QEMU and ivshmem servers."""

import os
import re
from collections.abc import Iterator

from ivsmc._cli import sockets
from ivsmc._cli.checks.finding import Finding, Scene, note, ok, wrong
from ivsmc._cli.ivshmem import admission, look
from ivsmc._cli.machine import Refused

_MODELS = ("ivshmem-doorbell", "ivshmem-plain")


def qemu(scene: Scene) -> Iterator[Finding]:
    """Look for a QEMU that has the devices."""
    names = (f"qemu-system-{os.uname().machine}", "qemu-kvm")
    program = next((name for name in names if scene.machine.find(name)), None)
    if program is None:
        yield scene.if_host(
            "no QEMU here: this machine cannot start VMs",
            "apt-get install qemu-system-x86 (or what your distribution calls it)",
        )
        return
    try:
        version = scene.machine.run(program, "--version").splitlines()[0]
        listed = scene.machine.run(program, "-device", "help")
    except Refused as error:
        yield scene.if_host(f"{program} does not run: {error}", None)
        return
    number = re.search(r"\d+(\.\d+)+", version)
    title = f"{program} {number[0] if number else version}"
    if missing := [model for model in _MODELS if f'"{model}"' not in listed]:
        yield scene.if_host(
            f"{title} has no {' and no '.join(missing)}; the builds of RHEL and its family leave "
            "it out",
            "use a QEMU of another distribution, or build one: ./configure "
            "--target-list=x86_64-softmmu",
        )
    else:
        yield ok(f"{title} has ivshmem-doorbell and ivshmem-plain")


def kvm(scene: Scene) -> Iterator[Finding]:
    """Ask whether VMs run fast."""
    if not scene.host:
        return
    if not scene.machine.exists("/dev/kvm"):
        yield note(
            "no /dev/kvm: VMs run in software emulation, many times slower",
            "switch virtualization on in the firmware, then: modprobe kvm_intel (or kvm_amd)",
        )
    elif not scene.machine.is_usable("/dev/kvm"):
        yield note("this user may not use /dev/kvm", "usermod -aG kvm $USER, then log in again")
    else:
        yield ok("/dev/kvm is usable")


def servers(scene: Scene) -> Iterator[Finding]:
    """Join the ivshmem servers of this machine, and leave them."""
    found = {
        f"{sockets.DIRECTORY}/{name}"
        for name in scene.machine.names(sockets.DIRECTORY)
        if name.endswith(".sock") and not sockets.is_agent(name)
    }
    for path in sorted(found | set(scene.sockets)):
        yield _server(scene, path)
    if not found and not scene.sockets and not scene.ivshmem:
        yield scene.if_host(
            f"no ivshmem server: there is no {sockets.DIRECTORY}/*.sock", "ivsmc server"
        )


def _server(scene: Scene, path: str) -> Finding:
    try:
        there = look(str(scene.machine.at(path)))
    except PermissionError:
        text = f"{path}: this user may not join"
        cure = admission(path)
        return wrong(text, cure) if path in scene.sockets else note(text, cure)
    except FileNotFoundError:
        return wrong(f"{path}: there is no such socket", f"ivsmc server {path}")
    except ConnectionRefusedError:
        return wrong(f"{path}: nobody listens there any more", f"ivsmc server {path}")
    except TimeoutError:
        return wrong(f"{path}: it does not answer", "stop it and start it again")
    except OSError as error:
        return wrong(f"{path}: {error.strerror or error}", "see the log of that ivshmem server")
    vectors = f"{there.vectors} vector{'' if there.vectors == 1 else 's'}"
    return ok(f"{path}: region of {there.size >> 20} MiB, {vectors}, {there.peers} other clients")
