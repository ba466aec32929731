"""Checks that are the same everywhere: the system, variables, devices and their regions."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import ivsmc
from ivsmc._cli.checks.finding import Finding, Scene, note, ok, wrong

VARIABLES = (
    "IVSMC_DEVICE",
    "IVSMC_EID",
    "IVSMC_SPIN_US",
    "IVSMC_MATCH_MS",
    "IVSMC_LOCAL_DIR",
    "IVSMC_LOCAL_SIZE",
    "IVSMC_UNCACHED",
)
_LITTLE = 256 << 20
"""Bytes free in /dev/shm below which it is worth a word: the region of ``local`` is that large."""


def system(_scene: Scene) -> Iterator[Finding]:
    """Say what this is."""
    cores = len(os.sched_getaffinity(0))
    yield ok(
        f"ivsmc {importlib.metadata.version('ivsmc')}, Python {platform.python_version()}, "
        f"Linux {platform.release()}, {cores} processor{'' if cores == 1 else 's'}"
    )


def variables(scene: Scene) -> Iterator[Finding]:
    """Show the variables that are set, and those that are misspelt."""
    for name, value in sorted(scene.environment.items()):
        if not name.startswith("IVSMC_") or name.startswith("IVSMC_REQUIRE_"):
            continue
        if name not in VARIABLES:
            yield note(
                f"{name} is none of ivsmc's variables ({', '.join(VARIABLES)})", f"unset {name}"
            )
        elif name == "IVSMC_DEVICE" and value.strip() == "none":
            yield note("IVSMC_DEVICE=none: shared memory is switched off", "unset IVSMC_DEVICE")
        else:
            yield ok(f"{name}={value}")


def shared_memory(scene: Scene) -> Iterator[Finding]:
    """Look for room in /dev/shm."""
    path = scene.machine.at("/dev/shm")
    try:
        status = os.statvfs(path)
    except OSError as error:
        yield wrong(f"/dev/shm: {error.strerror}", "mount -t tmpfs tmpfs /dev/shm")
        return
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    text = f"/dev/shm has {free >> 20} of {size >> 20} MiB free"
    if free < _LITTLE:
        yield note(
            f"{text}: regions there may run out of memory, and sessions fall back to TCP",
            "mount -o remount,size=1G /dev/shm (containers: --shm-size 1g)",
        )
    else:
        yield ok(text)


def devices(scene: Scene) -> Iterator[Finding]:
    """Show the devices that connections use by default."""
    named = scene.environment.get("IVSMC_DEVICE", "").strip()
    for device in scene.devices:
        spec = device["spec"]
        if not device["usable"]:
            reason = str(device["reason"]).removeprefix(f"device {spec}: ")
            finding = wrong if named else note
            yield finding(f"{spec}: {reason}", None)
            continue
        known = [f"{device['size'] >> 20} MiB", f"slot {device['slot']}"]
        if memory := device.get("memory"):
            known.append(f"{memory} memory")
        yield ok(f"{spec}: {', '.join(known)}")
    if named != "none" and not any(device["usable"] for device in scene.devices):
        yield wrong("no device can be used: all sessions go over TCP", "see the lines above")


def regions(scene: Scene) -> Iterator[Finding]:
    """Look for room in the regions, and for what dead peers hold."""
    for device in scene.devices:
        if not device["usable"]:
            continue
        spec = device["spec"]
        with ivsmc.open_device(spec) as opened:
            stats, census = opened.stats(), opened.census()
        yield region(spec, stats, census)


def region(spec: str, stats: dict[str, int], census: dict[str, int]) -> Finding:
    """Judge the numbers of one region."""
    total, used = stats["extents_total"], census["extents"]
    text = (
        f"{spec}: {census['live']} peer{'' if census['live'] == 1 else 's'}, "
        f"{census['listeners']} listener{'' if census['listeners'] == 1 else 's'}, "
        f"{used} of {total} extents in use"
    )
    if used >= total:
        return wrong(
            f"{text}: it is full, and new sessions go over TCP",
            "make the region larger, or find who holds it: ivsmc region " + spec,
        )
    if census["dead"]:
        return note(
            f"{text}; {census['dead']} dead, of which not all is given back yet",
            f"ivsmc region {spec}",
        )
    return ok(text)
