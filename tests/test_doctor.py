"""``ivsmc doctor``: what each check finds on machines made for it, and the whole on this one."""

import grp
import json
import os
import re
import shlex
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ivsmc
from commands import command, listening, run_here
from conftest import running_server
from endpoints import LOOPBACK
from guests import Guest, MiB
from ivsmc._cli.checks import CHECKS, Finding, Scene, Verdict
from ivsmc._cli.checks.here import VARIABLES, region
from ivsmc._cli.doctor import _within
from listening import listen
from processes import running
from tools import program

BDF = "0000:00:05.0"
OK, NOTE, WRONG = Verdict.OK, Verdict.NOTE, Verdict.WRONG
HELP = 'name "ivshmem-doorbell", bus PCI\nname "ivshmem-plain", bus PCI\n'


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def findings(name: str, machine: Guest, **scene: Any) -> list[Finding]:
    return list(CHECKS[name](Scene(machine, scene.pop("environment", {}), **scene)))


def finding(name: str, machine: Guest, **scene: Any) -> tuple[Verdict, str, str]:
    (found,) = findings(name, machine, **scene)
    return found.verdict, found.text, found.cure or ""


def assert_worth_a_note(name: str, guest: Guest, side: str, words: str, cure: str) -> None:
    """It is a note, unless it was asked for; both say ``words`` and the ``cure``."""
    for asked, expected in ((False, NOTE), (True, WRONG)):
        verdict, text, mend = finding(name, guest, **{side: asked})
        assert verdict is expected
        assert words in text
        assert cure in mend


def test_the_devices_of_a_vm(guest: Guest) -> None:
    assert_worth_a_note("pci", guest, "guest", "no ivshmem device", "ivsmc qemu-args")
    guest.add()
    assert finding("pci", guest) == (
        OK,
        f"{BDF} is ivshmem-doorbell, revision 1, region of 64 MiB, 2 vectors",
        "",
    )
    guest.add("0000:00:06.0", doorbell=False, size=4 * MiB, group=None)
    _, plain = findings("pci", guest)
    assert plain.text == "0000:00:06.0 is ivshmem-plain, revision 1, region of 4 MiB"
    guest.add("0000:00:07.0", numbers=(0x1AF4, 0x1000), driver="virtio-pci", group="4")
    assert len(findings("pci", guest)) == 2


def test_a_vm_without_doorbells(guest: Guest) -> None:
    """Who asks for a region and doorbells is told that there is only the one."""
    guest.add(doorbell=False, group=None)
    for asked, expected in ((False, NOTE), (True, WRONG)):
        device, lack = findings("pci", guest, guest=asked)
        assert (device.verdict, lack.verdict) == (OK, expected)
        assert "no ivshmem-doorbell device" in lack.text
        assert "ivsmc qemu-args" in (lack.cure or "")
    guest.add("0000:00:06.0")
    assert [found.verdict for found in findings("pci", guest, guest=True)] == [OK, OK]


@pytest.mark.parametrize("vectors", [1, 2, 256])
def test_its_vectors(guest: Guest, vectors: int) -> None:
    path = guest.add(vectors=vectors)
    config = guest.at(f"{path}/config")
    space = bytearray(config.read_bytes())
    assert finding("pci", guest)[1].endswith(f", {vectors} vector{'s' * (vectors > 1)}")
    # Another capability before it; the lowest two bits of pointers mean nothing.
    space[0x34], space[0x80:0x82] = 0x83, bytes([0x05, 0x43])
    config.write_bytes(space)
    assert finding("pci", guest)[1].endswith(f", {vectors} vector{'s' * (vectors > 1)}")
    # In circles, beyond the end, and what others than root may read.
    space[0x81] = 0x80
    config.write_bytes(space)
    assert finding("pci", guest)[1].endswith("region of 64 MiB")
    space[0x81] = 0xFC
    config.write_bytes(space[:0xFE])
    assert finding("pci", guest)[1].endswith("region of 64 MiB")
    config.write_bytes(space[:64])
    assert finding("pci", guest)[1].endswith("region of 64 MiB")


def test_revision_0(guest: Guest) -> None:
    guest.add(revision=0)
    verdict, text, cure = finding("pci", guest)
    assert (verdict, "QEMU before 2.6" in text, "newer QEMU" in cure) == (WRONG, True, True)


def test_its_driver(guest: Guest) -> None:
    guest.add()
    assert_worth_a_note("driver", guest, "guest", "no driver: it is used without doorbells", BDF)
    guest.add("0000:00:06.0", driver="vfio-pci", group="4")
    assert [found.verdict for found in findings("driver", guest)] == [NOTE, OK]


def test_the_driver_of_a_plain_device(guest: Guest) -> None:
    guest.add(doorbell=False)
    assert finding("driver", guest, guest=True)[0] is OK
    guest.add("0000:00:06.0", doorbell=False, driver="uio_pci_generic")
    found = findings("driver", guest)[1]
    verdict, text, cure = found.verdict, found.text, found.cure or ""
    assert verdict is WRONG
    assert "the driver uio_pci_generic has it" in text
    assert cure == "echo 0000:00:06.0 > /sys/bus/pci/drivers/uio_pci_generic/unbind"


def test_no_iommu(guest: Guest) -> None:
    guest.add(group=None)
    assert_worth_a_note("iommu", guest, "guest", "the VM has no IOMMU", "ivsmc qemu-args")
    guest.make("/sys/firmware/acpi/tables/DMAR")
    assert_worth_a_note("iommu", guest, "guest", "that Linux does not use", "intel_iommu=on")


def test_its_iommu_group(guest: Guest) -> None:
    guest.add()
    guest.link("/sys/class/iommu/dmar0", "/sys/devices/virtual/iommu/dmar0")
    assert finding("iommu", guest) == (OK, f"{BDF} is in group 3 of dmar0, alone", "")
    guest.add("0000:00:1c.0", numbers=(0x8086, 0x3420), kind=0x060400, driver="pcieport")
    assert finding("iommu", guest)[:2] == (
        OK,
        f"{BDF} is in group 3 of dmar0, with 0000:00:1c.0",
    )
    guest.add("0000:00:06.0", numbers=(0x1AF4, 0x1041), kind=0x020000, driver="virtio-pci")
    verdict, text, cure = finding("iommu", guest)
    assert verdict is WRONG
    assert "shares IOMMU group 3 with 0000:00:06.0 (virtio-pci)" in text
    assert "pcie.0" in cure


def test_a_device_without_an_iommu_says_what_that_means(guest: Guest) -> None:
    guest.add(group=None)
    guest.has_driver("vfio-pci")
    guest.make("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y")
    guest.write(f"/sys/bus/pci/devices/{BDF}/driver_override", "vfio-pci")
    guest.write("/sys/bus/pci/drivers_probe", BDF)
    verdict, text, _ = finding("iommu", guest)
    assert verdict is NOTE
    assert "who may open /dev/vfio/noiommu-0 can write anywhere in this VM" in text
    assert "vfio_iommu_type1" not in finding("modules", guest)[1]


def test_the_modules(guest: Guest) -> None:
    guest.add()
    assert findings("modules", guest) == [], "nothing is bound"
    guest.add("0000:00:06.0", driver="vfio-pci", group="4")
    guest.make("/sys/module/vfio/refcnt")
    verdict, _, cure = finding("modules", guest)
    assert (verdict, cure) == (WRONG, "modprobe -a vfio_pci vfio_iommu_type1")
    guest.make("/sys/module/vfio_pci/refcnt")
    guest.make("/sys/module/vfio_iommu_type1/refcnt")
    assert finding("modules", guest)[0] is OK


@pytest.fixture
def nobody_may(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Paths that this user, who may be root, may not use."""
    paths: set[str] = set()
    usable = guest.is_usable
    monkeypatch.setattr(guest, "is_usable", lambda path: path not in paths and usable(path))
    return paths


def test_who_may_use_it(guest: Guest, nobody_may: set[str]) -> None:
    path = guest.add()
    assert finding("access", guest) == (
        OK,
        f"this user may use {path}/resource2 and {path}/resource0",
        "",
    )
    for file in ("resource0", "resource2"):
        nobody_may.add(f"{path}/{file}")
        verdict, text, cure = finding("access", guest)
        nobody_may.clear()
        assert (verdict, text) == (WRONG, f"this user may not use {path}/{file}")
        assert cure.endswith(f"ivsmc bind {BDF} --group ivsmc")


def test_a_plain_device_is_opened_by_one_file(guest: Guest, nobody_may: set[str]) -> None:
    path = guest.add(doorbell=False, group=None)
    nobody_may.add(f"{path}/resource0")
    assert finding("access", guest)[:2] == (OK, f"this user may use {path}/resource2")
    nobody_may.add(f"{path}/resource2")
    assert finding("access", guest)[2].endswith(f"ivsmc bind {BDF} --group ivsmc")


def carry_out_cure(guest: Guest, cure: str) -> None:
    """Run the command of a cure, which is for another group, in a VM made of files."""
    arguments = shlex.split(cure.rpartition("; ")[2])
    assert arguments[:2] == ["ivsmc", "bind"]
    arguments[-1] = str(grp.getgrgid(os.getgid()).gr_name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ivsmc._cli.bind.Machine", lambda: guest)
        run_here(*arguments[1:])


@pytest.mark.parametrize("neighbour", [False, True], ids=["no IOMMU", "a shared group"])
def test_the_cure_of_a_doorbell_device_that_vfio_does_not_open(
    guest: Guest, nobody_may: set[str], neighbour: bool
) -> None:
    """What the doctor says to do is not refused, and does it."""
    path = guest.add(group="3" if neighbour else None)
    if neighbour:
        numbers = (0x1AF4, 0x1041)
        guest.add("0000:00:06.0", numbers=numbers, kind=0x020000, driver="virtio-pci")
    nobody_may.update(f"{path}/{file}" for file in ("resource0", "resource2"))
    verdict, text, cure = finding("access", guest)
    assert (verdict, text) == (
        WRONG,
        f"this user may not use {path}/resource2 and {path}/resource0",
    )
    before = guest.snapshot()
    carry_out_cure(guest, cure)
    changed = {f"/{name}" for name, now in guest.snapshot().items() if now != before[name]}
    assert changed == {f"{path}/enable", f"{path}/resource0", f"{path}/resource2"}
    assert guest.read(f"{path}/enable") == "1"
    for file in ("resource0", "resource2"):
        assert stat.S_IMODE(guest.at(f"{path}/{file}").stat().st_mode) == 0o660
    assert "mend its IOMMU group" in finding("driver", guest)[2]


def test_who_may_use_its_group(guest: Guest, nobody_may: set[str]) -> None:
    guest.add(driver="vfio-pci")
    assert finding("access", guest)[1:] == (
        "/dev/vfio/vfio cannot be opened",
        "chmod 666 /dev/vfio/vfio",
    )
    guest.make("/dev/vfio/vfio")
    assert finding("access", guest)[:2] == (OK, "this user may use /dev/vfio/3")
    nobody_may.add("/dev/vfio/3")
    assert finding("access", guest)[:2] == (WRONG, "this user may not use /dev/vfio/3")
    guest.make("/run/ivsmc/agent.sock")
    assert finding("access", guest)[:2] == (OK, "/dev/vfio/3 is the agent's")
    guest.at("/run/ivsmc/agent.sock").unlink()
    guest.at("/dev/vfio/3").unlink()
    assert finding("access", guest)[:2] == (WRONG, "there is no /dev/vfio/3")


def test_the_agent(guest: Guest) -> None:
    assert findings("agent", guest) == []
    guest.add(driver="vfio-pci")
    assert finding("agent", guest)[::2] == (NOTE, "ivsmc agent")
    guest.make("/run/ivsmc/agent.sock")
    assert finding("agent", guest)[:2] == (
        WRONG,
        "/run/ivsmc/agent.sock does not answer: Connection refused",
    )
    path = guest.at("/run/ivsmc/agent.sock")
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert finding("agent", guest)[0] is OK


def test_the_agent_of_one_of_two_devices(guest: Guest) -> None:
    """Its socket is not taken for an ivshmem server's, and the other device has none."""
    guest.add(driver="vfio-pci")
    guest.add("0000:00:06.0", driver="vfio-pci")
    path = f"/run/ivsmc/agent-{BDF}.sock"
    guest.make(path)
    guest.at(path).unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(guest.at(path)))
        listener.listen()
        assert findings("servers", guest) == []
        without, answers = findings("agent", guest)
        assert (without.verdict, without.cure) == (NOTE, "ivsmc agent 0000:00:06.0")
        assert (answers.verdict, answers.text) == (OK, f"the agent answers at {path}")


def test_qemu(guest: Guest) -> None:
    assert_worth_a_note("qemu", guest, "host", "no QEMU here", "apt-get install qemu-system-x86")
    guest.programs["qemu-kvm"] = {"--version": "QEMU emulator version 9.1.0", "-device": ""}
    assert_worth_a_note("qemu", guest, "host", "qemu-kvm 9.1.0 has no ivshmem-doorbell", "build")
    assert "RHEL" in finding("qemu", guest)[1]
    guest.programs["qemu-kvm"]["-device"] = HELP
    assert finding("qemu", guest)[0] is OK


def test_this_qemu() -> None:
    program("qemu-system-x86_64")
    result = command("doctor", "--host", "--json")
    (found,) = [
        entry for entry in json.loads(result.stdout)["findings"] if entry["check"] == "qemu"
    ]
    assert found["verdict"] == "ok"
    assert found["text"].endswith("has ivshmem-doorbell and ivshmem-plain")


def test_kvm(guest: Guest) -> None:
    assert findings("kvm", guest) == []
    assert finding("kvm", guest, host=True)[0] is NOTE
    guest.make("/dev/kvm")
    assert finding("kvm", guest, host=True)[0] is OK


def test_ivshmem_servers(guest: Guest) -> None:
    assert_worth_a_note("servers", guest, "host", "no ivshmem server", "ivsmc server")
    path = guest.at("/run/ivsmc/ivs0.sock")
    path.parent.mkdir(parents=True)
    with running_server(path, "--vectors", "2"):
        assert finding("servers", guest) == (
            OK,
            "/run/ivsmc/ivs0.sock: region of 64 MiB, 2 vectors, 0 other clients",
            "",
        )
        with ivsmc.open_device(f"host:{path}"):
            assert finding("servers", guest)[1].endswith("2 vectors, 1 other clients")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert finding("servers", guest) == (
        WRONG,
        "/run/ivsmc/ivs0.sock: nobody listens there any more",
        "ivsmc server /run/ivsmc/ivs0.sock",
    )
    _, missing = findings("servers", guest, sockets=("/elsewhere.sock",))[::-1]
    assert (missing.verdict, missing.text) == (WRONG, "/elsewhere.sock: there is no such socket")


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "it turned the client away"),
        (b"\x01" + bytes(7), "it speaks version 1 of the protocol"),
        (bytes(24), "is it an ivshmem server?"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks version"),
    ],
)
def test_what_is_no_ivshmem_server(guest: Guest, sent: bytes, words: str) -> None:
    path = guest.at("/run/ivsmc/web.sock")
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        answerer = threading.Thread(target=_answer, args=(listener, sent))
        answerer.start()
        verdict, text, _ = finding("servers", guest)
        answerer.join()
    assert verdict is WRONG
    assert words in text


def _answer(listener: socket.socket, sent: bytes) -> None:
    client, _ = listener.accept()
    with client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)


def test_variables(guest: Guest) -> None:
    environment = {
        "IVSMC_DEVICE": "none",
        "IVSMC_DEVICES": "local",
        "IVSMC_REQUIRE_TOOLS": "1",
        "IVSMC_SPIN_US": "0",
        "PATH": "/bin",
    }
    off, unknown, known = findings("variables", guest, environment=environment)
    assert (off.verdict, off.cure) == (NOTE, "unset IVSMC_DEVICE")
    assert (unknown.verdict, unknown.cure) == (NOTE, "unset IVSMC_DEVICES")
    assert (known.verdict, known.text) == (OK, "IVSMC_SPIN_US=0")


def test_shared_memory(guest: Guest) -> None:
    assert finding("shm", guest)[0] is WRONG
    guest.at("/dev/shm").mkdir(parents=True)
    verdict, text, _ = finding("shm", guest)
    assert verdict in (OK, NOTE), "it is that of the directory's file system"
    assert "MiB free" in text


DEVICE = {"spec": "local", "kind": "local", "usable": True, "size": 64 * MiB, "slot": "0.1"}
BROKEN = {"spec": "host:/x", "kind": "host", "usable": False, "reason": "device host:/x: gone"}


def test_devices(guest: Guest) -> None:
    assert finding("devices", guest, devices=[DEVICE]) == (OK, "local: 64 MiB, slot 0.1", "")
    found = findings("devices", guest, devices=[DEVICE, BROKEN])
    assert [(f.verdict, f.text) for f in found][1] == (NOTE, "host:/x: gone")
    named = {"IVSMC_DEVICE": "local,host:/x"}
    found = findings("devices", guest, devices=[DEVICE, BROKEN], environment=named)
    assert found[1].verdict is WRONG
    found = findings("devices", guest, devices=[BROKEN])
    assert found[1].text == "no device can be used: all sessions go over TCP"
    assert findings("devices", guest, environment={"IVSMC_DEVICE": "none"}) == []


@pytest.mark.parametrize(
    ("used", "dead", "verdict"), [(0, 0, OK), (7, 0, OK), (7, 1, NOTE), (8, 0, WRONG)]
)
def test_the_room_in_a_region(used: int, dead: int, verdict: Verdict) -> None:
    census = {"live": 2, "dead": dead, "listeners": 1, "extents": used}
    found = region("local", {"extents_total": 8}, census)
    assert found.verdict is verdict
    assert f"local: 2 peers, 1 listener, {used} of 8 extents in use" in found.text


def report(*arguments: str, **options: Any) -> dict[str, Any]:
    result = command("doctor", "--json", *arguments, **options)
    found = json.loads(result.stdout)
    assert result.returncode == (0 if found["ok"] else 1)
    assert isinstance(found, dict)
    return found


def entries(found: dict[str, Any], check: str) -> Iterator[dict[str, Any]]:
    return (entry for entry in found["findings"] if entry["check"] == check)


def test_the_whole_on_this_machine(device_specs: dict[str, str]) -> None:
    """Data goes over each device, between two processes."""
    usable = [spec for kind, spec in device_specs.items() if kind != "none"]
    found = report("--device", ",".join(usable))
    assert found["ok"], found
    trips = list(entries(found, "round trip"))
    assert {entry["text"].split(": ")[0] for entry in trips} == set(usable)
    assert all("1 MiB came as sent, round trip" in entry["text"] for entry in trips)
    text = command("doctor", "--device", ",".join(usable))
    assert text.returncode == 0
    assert text.stdout.endswith("\nnothing wrong\n")


def test_what_is_wrong_is_said_with_its_cure() -> None:
    result = command("doctor", "--device", "file:/nonexistent/region")
    assert result.returncode == 1
    assert "WRONG  devices     file:/nonexistent/region: there is no such file" in result.stdout
    assert result.stdout.endswith("\n2 wrong\n")
    malformed = report("--device", "floppy:")
    assert not malformed["ok"]
    (entry,) = entries(malformed, "devices")
    assert "not a device" in entry["text"]
    asked = report("--device", "local", "--socket", "/nonexistent.sock")
    assert not asked["ok"]


def test_a_device_of_one_process(shared_device: str) -> None:
    assert _within(shared_device).verdict is OK


def test_a_listener_elsewhere(shared_device: str, free_port: int) -> None:
    """It says which transport a connection there takes, and why."""
    address = ("127.0.0.1", free_port)
    with running(listen, address, {"IVSMC_DEVICE": shared_device}, {}) as remote:
        remote.receive()
        remote.send("hold")
        over = report("--device", shared_device, "--to", f"127.0.0.1:{free_port}")
        (entry,) = entries(over, "to")
        assert entry["verdict"] == "ok"
        assert f"over shared memory, device {shared_device}" in entry["text"]
        remote.receive()
        remote.send(None)


def test_a_bench_elsewhere(shared_device: str, free_port: int) -> None:
    with listening(free_port, "--device", shared_device):
        over = report("--device", shared_device, "--to", f"127.0.0.1:{free_port}")
    (entry,) = entries(over, "to")
    assert entry["verdict"] == "ok"
    assert re.search(r"; 1 MiB came as sent, round trip [\d.]+ us$", entry["text"])


def test_a_listener_that_does_not_share_memory() -> None:
    with socket.create_server(LOOPBACK) as listener:
        port = listener.getsockname()[1]
        (entry,) = entries(report("--device", "local", "--to", f"127.0.0.1:{port}"), "to")
        assert entry["verdict"] == "wrong"
        assert "over TCP: PEER_NO_SMC" in entry["text"]
    (entry,) = entries(report("--device", "local", "--to", f"127.0.0.1:{port}"), "to")
    assert "Connection refused" in entry["text"]
    assert entry["cure"] == f"start a listener there: ivsmc bench --listen {port}"


def test_it_knows_the_variables_of_the_readme() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    listed = re.findall(r"^\| `(IVSMC_\w+)` \|", readme, re.MULTILINE)
    assert listed
    assert set(listed) <= set(VARIABLES)
