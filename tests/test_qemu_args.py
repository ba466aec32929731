"""``ivsmc qemu-args`` and ``ivsmc xml``: QEMU takes the options, libvirt's schema the elements."""

import errno
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from commands import command, run_here
from conftest import running_server
from ivsmc._cli.machine import Refused
from tools import program

SCHEMA = Path("/usr/share/libvirt/schemas/domain.rng")
KVM = Path("/dev/kvm")
UUID = "5fbf4d4e-6f2f-4b61-9d2c-2a50d4c2e7a1"
MiB = 1 << 20
REGION = 64 * MiB
"""What ``running_server`` serves."""


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    """The socket of an ivshmem server with 3 vectors; the comma wants to be escaped."""
    path = tmp_path / "ivs,0.sock"
    with running_server(path, "--vectors", "3"):
        yield path


@pytest.fixture
def region() -> Iterator[Path]:
    """A shared file directly in /dev/shm, as libvirt has them."""
    path = Path(f"/dev/shm/ivsmc-xml-{os.getpid()}")
    with path.open("xb") as file:
        file.truncate(4 * MiB)
    yield path
    path.unlink()


def pci_devices(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """What a VM with ``arguments`` has, by QEMU's ids; it is never started."""
    words = '{"execute": "qmp_capabilities"} {"execute": "query-pci"} {"execute": "quit"}'
    fixed = ["-S", "-display", "none", "-nodefaults", "-m", "64M", "-qmp", "stdio"]
    result = subprocess.run(
        [program("qemu-system-x86_64"), *fixed, *arguments],
        input=words,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    (buses,) = [answer["return"] for answer in answers if answer.get("return")]
    return {device["qdev_id"]: device for bus in buses for device in bus["devices"]}


def assert_ivshmem(device: dict[str, Any], *, size: int, doorbell: bool) -> None:
    assert (device["id"]["vendor"], device["id"]["device"]) == (0x1AF4, 0x1110)
    assert device["bus"] == 0, "in an IOMMU group of its own"
    bars = {bar["bar"]: bar["size"] for bar in device["regions"]}
    assert bars[0] == 256
    assert bars[2] == size
    assert (1 in bars) is doorbell


def accelerators() -> list[str]:
    usable = KVM.exists() and os.access(KVM, os.R_OK | os.W_OK)
    return ["tcg", "kvm"] if usable else ["tcg"]


@pytest.mark.parametrize("accel", accelerators())
def test_qemu_takes_the_options_of_a_doorbell_device(socket_path: Path, accel: str) -> None:
    result = command("qemu-args", "--socket", str(socket_path), "--accel", accel, "--uuid", UUID)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    assert words[-1] == "ivshmem-doorbell,id=ivsmc0,chardev=ivsmc0-server,vectors=3"
    assert words[words.index("-uuid") + 1] == UUID
    found = pci_devices(words)
    assert_ivshmem(found["ivsmc0"], size=REGION, doorbell=True)
    assert "intel_iommu=on" in result.stderr


def test_qemu_takes_several_devices(socket_path: Path, region: Path) -> None:
    first = command("qemu-args", "--socket", str(socket_path), "--accel", "tcg", "--caching-mode")
    second = command("qemu-args", "--file", str(region), "--name", "plain", "--no-iommu")
    report = json.loads(command("qemu-args", "--file", str(region), "--json").stdout)
    assert not any("-machine" in word for word in report["arguments"]), "plain needs no IOMMU"
    found = pci_devices(shlex.split(first.stdout) + shlex.split(second.stdout))
    assert_ivshmem(found["ivsmc0"], size=REGION, doorbell=True)
    assert_ivshmem(found["plain"], size=4 * MiB, doorbell=False)


def test_qemu_has_the_iommu(socket_path: Path) -> None:
    result = command("qemu-args", "--socket", str(socket_path), "--accel", "tcg", "--caching-mode")
    monitor = subprocess.run(
        [
            *(program("qemu-system-x86_64"), "-S", "-display", "none", "-nodefaults"),
            *("-monitor", "stdio", *shlex.split(result.stdout)),
        ],
        input="info qtree\nquit\n",
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    iommu = monitor.stdout[monitor.stdout.index("dev: intel-iommu") :]
    assert re.search(r'intremap = "on"', iommu)
    assert re.search(r"caching-mode = true", iommu)


def test_an_ivshmem_server_that_does_not_run(tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    for name in ("qemu-args", "xml"):
        refused = command(name, "--socket", path)
        assert refused.returncode == 1
        assert f"no ivshmem server answers at {path}" in refused.stderr
        assert f"ivsmc server {path}" in refused.stderr
        told = command(name, "--socket", path, "--vectors", "2")
        assert told.returncode == 0, told.stderr
        assert "start the ivshmem server before the VM" in told.stderr


@pytest.mark.parametrize("name", ["qemu-args", "xml"])
def test_an_ivshmem_server_that_this_user_may_not_join(
    socket_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It runs: nobody is told to start it."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if os.getuid() == 0:  # who may join all
        monkeypatch.setattr("ivsmc._cli.vm.look", refuse)
    socket_path.chmod(0)
    cure = f"chgrp GROUP {socket_path}; chmod 660 {socket_path}"
    with pytest.raises(Refused, match=f"this user may not join .*{re.escape(cure)}"):
        run_here(name, "--socket", str(socket_path))
    assert run_here(name, "--socket", str(socket_path), "--vectors", "3") == 0
    said = capsys.readouterr().err
    assert cure in said
    assert "start the ivshmem server before" not in said


def test_fewer_vectors_than_qemu_would_be_sent(socket_path: Path) -> None:
    refused = command("qemu-args", "--socket", str(socket_path), "--vectors", "2")
    assert refused.returncode == 1
    assert "give --vectors 3" in refused.stderr
    more = command("qemu-args", "--socket", str(socket_path), "--vectors", "4", "--accel", "tcg")
    assert_ivshmem(pci_devices(shlex.split(more.stdout))["ivsmc0"], size=REGION, doorbell=True)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--file", "/nonexistent/region"], 1, "there is no such file; say its --size"),
        (["--file", "/nonexistent/region", "--size", "3M"], 1, "a power of two, at least 1M"),
        (["--file", "/nonexistent/region", "--size", "512K"], 1, "a power of two, at least 1M"),
        (["--file", "/region", "--vectors", "2"], 2, "an ivshmem-plain device has none"),
        (["--size", "4M"], 2, "the ivshmem server decides it"),
        (["--file", "/a", "--socket", "/b"], 2, "not allowed with"),
        (["--name", "a,b"], 2, "not a name: 'a,b'"),
        (["--vectors", "257"], 2, "'257' is not in"),
    ],
)
@pytest.mark.parametrize("name", ["qemu-args", "xml"])
def test_what_cannot_be(name: str, arguments: list[str], status: int, words: str) -> None:
    result = command(name, *arguments)
    assert (result.returncode, result.stdout) == (status, "")
    assert words in result.stderr


@pytest.mark.parametrize("text", ["x", "00000000-0000-0000-0000-000000000000"])
def test_a_uuid_that_names_no_vm(text: str) -> None:
    assert command("qemu-args", "--uuid", text).returncode == 2


def test_the_size_of_a_file_is_kept(region: Path) -> None:
    result = command("qemu-args", "--file", str(region), "--size", "8M")
    assert result.returncode == 1
    assert "has 4194304 bytes, not 8388608" in result.stderr


def test_a_file_to_be_made(tmp_path: Path) -> None:
    path = tmp_path / "region"
    result = command("qemu-args", "--file", str(path), "--size", "2M")
    assert f"fallocate -l 2097152 {path}" in result.stderr


def elements(*arguments: str) -> ET.Element:
    """The domain that ``ivsmc xml`` prints, valid by libvirt's schema once it is a domain."""
    result = command("xml", *arguments)
    assert result.returncode == 0, result.stderr
    domain = ET.fromstring(result.stdout)
    whole = ET.fromstring(result.stdout)
    for name, text in (("name", "test"), ("memory", "524288")):
        ET.SubElement(whole, name).text = text
    if whole.find("os") is None:
        ET.SubElement(ET.SubElement(whole, "os"), "type", machine="q35").text = "hvm"
    if not SCHEMA.exists():
        pytest.skip(f"there is no {SCHEMA} (package libvirt0)")
    lint = subprocess.run(
        [program("xmllint"), "--noout", "--relaxng", str(SCHEMA), "-"],
        input=ET.tostring(whole),
        capture_output=True,
        check=False,
    )
    assert lint.returncode == 0, lint.stderr.decode()
    return domain


def test_libvirt_takes_a_doorbell_device(socket_path: Path) -> None:
    domain = elements("--socket", str(socket_path), "--caching-mode", "--slot", "18")
    shmem = domain.find("devices/shmem")
    assert shmem is not None
    assert shmem.get("name") == "ivsmc0"
    assert {child.tag: dict(child.attrib) for child in shmem} == {
        "model": {"type": "ivshmem-doorbell"},
        "server": {"path": str(socket_path)},
        "msi": {"vectors": "3", "ioeventfd": "on"},
        "address": {
            "type": "pci",
            "domain": "0x0000",
            "bus": "0x00",
            "slot": "0x12",
            "function": "0x0",
        },
    }
    driver = domain.find("devices/iommu[@model='intel']/driver")
    assert driver is not None
    assert driver.attrib == {"intremap": "on", "caching_mode": "on"}
    assert domain.find("features/ioapic[@driver='qemu']") is not None
    assert domain.find("os/type[@machine='q35']") is not None


def test_the_elements_as_json(socket_path: Path, region: Path) -> None:
    """The same elements, and what else is to be done."""
    for where in (["--socket", str(socket_path)], ["--file", str(region)]):
        text = command("xml", *where)
        result = command("xml", "--json", *where)
        assert (result.returncode, result.stderr) == (0, "")
        report = json.loads(result.stdout)
        assert set(report) == {"xml", "notes"}
        assert f"{report['xml']}\n" == text.stdout
        assert [f"ivsmc xml: {note}" for note in report["notes"]] == text.stderr.splitlines()
        assert report["notes"]


def test_libvirt_takes_a_plain_device(region: Path) -> None:
    domain = elements("--file", str(region))
    shmem = domain.find("devices/shmem")
    assert shmem is not None
    assert shmem.get("name") == region.name
    size = shmem.find("size[@unit='M']")
    assert size is not None
    assert size.text == "4"
    assert domain.find("devices/iommu") is None, "a plain device needs none"


def test_what_libvirt_has_no_element_for(tmp_path: Path) -> None:
    file = tmp_path / "region"
    with file.open("xb") as region:
        region.truncate(2 * MiB)
    domain = elements("--file", str(file))
    assert domain.find("devices") is None
    arguments = domain.findall("{*}commandline/{*}arg")
    words = [argument.get("value", "") for argument in arguments]
    assert words[-1].endswith("bus=pcie.0,addr=0x10")
    found = pci_devices(["-machine", "q35,accel=tcg", *words])
    assert_ivshmem(found["ivsmc0"], size=2 * MiB, doorbell=False)
    assert found["ivsmc0"]["slot"] == 16
