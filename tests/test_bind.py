"""``ivsmc bind`` and ``unbind`` on the files of a guest: every way, every refusal, every undo."""

import grp
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from commands import command, run_here
from guests import DRIVERS, NOIOMMU, Guest
from ivsmc._cli import binding, pci
from ivsmc._cli.binding import Wish
from ivsmc._cli.machine import Machine, Refused
from ivsmc._cli.steps import carry_out

BDF = "0000:00:05.0"
RULE = "/etc/udev/rules.d/70-ivsmc-0000-00-05.0.rules"
GROUP = grp.getgrgid(os.getgid()).gr_name


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def bind(guest: Guest, wish: Wish | None = None, device: str | None = None) -> list[str]:
    """Bind as the command does; return the steps."""
    wish = wish or Wish()
    found = pci.named(guest, device)
    return carry_out(binding.bound(guest, found, wish), lambda _: None, dry_run=wish.dry_run)


def unbind(guest: Guest, device: str | None = None) -> list[str]:
    found = pci.named(guest, device)
    return carry_out(binding.unbound(guest, found), lambda _: None, dry_run=False)


def driver(guest: Guest, address: str = BDF) -> str | None:
    return guest.target(f"{pci.DEVICES}/{address}/driver")


def mode(guest: Guest, path: str) -> int:
    return stat.S_IMODE(guest.at(path).stat().st_mode)


def test_a_doorbell_device_is_bound_and_taken_back(guest: Guest) -> None:
    path = guest.add()
    before = guest.snapshot()
    assert bind(guest) == [
        "modprobe vfio-pci",
        f"echo vfio-pci > {path}/driver_override",
        f"echo {BDF} > /sys/bus/pci/drivers_probe",
    ]
    device = pci.named(guest, BDF)
    assert (device.driver, device.node) == ("vfio-pci", "/dev/vfio/3")
    assert binding.spec(device) == f"vfio:{BDF}"
    assert bind(guest) == [], "it is bound already"
    assert unbind(guest) == [
        f"echo > {path}/driver_override",
        f"echo {BDF} > {DRIVERS}/vfio-pci/unbind",
        f"echo {BDF} > /sys/bus/pci/drivers_probe",
    ]
    assert guest.snapshot() == before
    assert unbind(guest) == [], "it is not bound"


@pytest.mark.parametrize(
    ("there", "wish"),
    [
        ({}, Wish(mode=0o666, persist=True)),
        ({"group": None}, Wish(mode=0o666, persist=True, unsafe_noiommu=True)),
        ({"group": None}, Wish(mode=0o666, persist=True, no_vfio=True)),
        ({"group": None, "doorbell": False}, Wish(mode=0o666, persist=True)),
    ],
    ids=["vfio", "no IOMMU", "no VFIO", "plain"],
)
def test_unbind_undoes_all_that_bind_did(guest: Guest, there: dict[str, Any], wish: Wish) -> None:
    guest.add(**there)
    guest.make(NOIOMMU, "N\n")
    before = guest.snapshot()
    bind(guest, wish)
    assert guest.snapshot() != before
    unbind(guest)
    assert guest.snapshot() == before
    assert unbind(guest) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to any group")
@pytest.mark.parametrize("doorbell", [False, True])
def test_unbind_takes_the_files_from_their_group(guest: Guest, doorbell: bool) -> None:
    other = next(entry for entry in grp.getgrall() if entry.gr_gid != os.getgid())
    path = guest.add(doorbell=doorbell)
    bind(guest, Wish(group=other.gr_name, no_vfio=True))
    resources = [guest.at(file) for file in pci.named(guest, None).resources]
    assert {file.stat().st_gid for file in resources} == {other.gr_gid}
    unbind(guest)
    assert {file.stat().st_gid for file in resources} == {guest.at(path).stat().st_gid}


def test_unbind_leaves_other_devices_without_an_iommu(guest: Guest) -> None:
    """Only after the last of them is VFIO what it was."""
    guest.make(NOIOMMU, "N\n")
    wish = Wish(unsafe_noiommu=True)
    addresses = [BDF, "0000:00:06.0"]
    for address in addresses:
        guest.add(address, group=None)
        bind(guest, wish, address)
    left = []
    for address in addresses:
        unbind(guest, address)
        left.append(guest.read(NOIOMMU))
    assert left == ["Y", "N"]


def test_a_former_driver_gives_way(guest: Guest) -> None:
    guest.add(driver="uio_pci_generic")
    steps = bind(guest)
    assert f"echo {BDF} > {DRIVERS}/uio_pci_generic/unbind" in steps
    assert driver(guest) == "vfio-pci"


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        (Wish(group=GROUP), 0o660),
        (Wish(group=str(os.getgid())), 0o660),
        (Wish(mode=0o666), 0o666),
        (Wish(group=GROUP, mode=0o640), 0o640),
    ],
)
def test_who_may_use_it(guest: Guest, wish: Wish, expected: int) -> None:
    guest.add()
    steps = bind(guest, wish)
    assert f"chmod {expected:o} /dev/vfio/3" in steps
    assert mode(guest, "/dev/vfio/3") == expected
    assert bind(guest, wish) == []


@pytest.mark.parametrize("group", ["domain users", "a;reboot", "$x", "'", "-r", ""])
def test_a_group_whose_name_means_something_to_a_shell(guest: Guest, group: str) -> None:
    guest.add()
    with pytest.raises(Refused, match="characters in its name"):
        bind(guest, Wish(group=group, persist=True))


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to any group")
def test_the_group_owns_the_node(guest: Guest) -> None:
    other = next(entry for entry in grp.getgrall() if entry.gr_gid != os.getgid())
    guest.add()
    assert f"chgrp {other.gr_name} /dev/vfio/3" in bind(guest, Wish(group=other.gr_name))
    assert guest.at("/dev/vfio/3").stat().st_gid == other.gr_gid


def test_a_udev_rule_keeps_it(guest: Guest) -> None:
    guest.add()
    guest.make("/run/udev/control")
    wish = Wish(group=GROUP, persist=True)
    steps = bind(guest, wish)
    rule = guest.at(RULE).read_text()
    assert steps[-2] == f"cat > {RULE} <<'END'\n{rule}END", "--dry-run shows all of it"
    assert steps[-1] == "udevadm control --reload"
    assert guest.reloads == 1
    comment, device, node = rule.splitlines()
    assert comment.startswith("# Written by ivsmc bind --persist")
    assert f'KERNEL=="{BDF}"' in device
    assert 'ATTR{driver_override}="vfio-pci"' in device
    assert "enable_unsafe_noiommu_mode" not in device
    assert node.endswith(f'GROUP="{GROUP}", MODE="0660"')
    assert bind(guest, wish) == []
    assert unbind(guest)[:2] == [f"rm {RULE}", "udevadm control --reload"]
    assert not guest.exists(RULE)


def test_a_plain_device_needs_no_driver(guest: Guest) -> None:
    path = guest.add(doorbell=False, group=None)
    wish = Wish(group=GROUP, mode=0o600, persist=True)
    guest.at(f"{path}/resource2").chmod(0o644)
    guest.at(f"{path}/resource0").chmod(0o644)
    steps = bind(guest, wish)
    assert steps[:2] == [f"echo 1 > {path}/enable", f"chmod 600 {path}/resource2"]
    assert driver(guest) is None
    assert mode(guest, f"{path}/resource0") == 0o644, "its registers do nothing"
    assert binding.spec(pci.named(guest, None)) == f"pci:{BDF}"
    assert (
        f"chgrp {GROUP} {path}/resource2; chmod 600 {path}/resource2" in guest.at(RULE).read_text()
    )
    assert bind(guest, wish) == []


def test_a_doorbell_device_without_vfio(guest: Guest) -> None:
    """Who may use it may also notify, for which ``resource0`` is."""
    path = guest.add(group=None)
    wish = Wish(group=GROUP, no_vfio=True, persist=True)
    files = [f"{path}/resource2", f"{path}/resource0"]
    assert bind(guest, wish)[:3] == [
        f"echo 1 > {path}/enable",
        *(f"chmod 660 {file}" for file in files),
    ]
    assert (driver(guest), guest.exists("/sys/bus/pci/drivers/vfio-pci")) == (None, False)
    assert binding.spec(pci.named(guest, None)) == f"pci:{BDF}"
    rule = guest.at(RULE).read_text()
    assert f"chgrp {GROUP} {' '.join(files)}; chmod 660 {' '.join(files)}'" in rule
    assert bind(guest, wish) == []


@pytest.mark.parametrize(
    ("has", "cure"),
    [
        ("vfio-pci", f"ivsmc unbind {BDF}"),
        ("uio_pci_generic", f"echo {BDF} > {DRIVERS}/uio_pci_generic/unbind"),
    ],
)
def test_without_vfio_no_driver_is_taken_away(guest: Guest, has: str, cure: str) -> None:
    guest.add(driver=has)
    before = guest.snapshot()
    with pytest.raises(Refused, match=f"ivshmem-doorbell device that the driver {has} has.*{cure}"):
        bind(guest, Wish(no_vfio=True))
    assert guest.snapshot() == before


def test_without_an_iommu_it_is_refused_in_words(guest: Guest) -> None:
    guest.add(group=None)
    before = guest.snapshot()
    with pytest.raises(
        Refused, match=r"has no IOMMU; start the VM with one .*--no-vfio.*--unsafe-noiommu"
    ):
        bind(guest)
    guest.make("/sys/firmware/acpi/tables/DMAR")
    with pytest.raises(Refused, match=r"Linux does not use; boot with intel_iommu=on"):
        bind(guest)
    guest.at("/sys/firmware/acpi/tables/DMAR").unlink()
    assert guest.snapshot() == before


def test_without_an_iommu_when_asked_for(guest: Guest) -> None:
    guest.add(group=None)
    wish = Wish(unsafe_noiommu=True, mode=0o600, persist=True)
    with pytest.raises(Refused, match=r"CONFIG_VFIO_NOIOMMU"):
        bind(guest, wish)
    guest.make(NOIOMMU, "N\n")
    assert f"echo Y > {NOIOMMU}" in bind(guest, wish)
    assert pci.named(guest, None).node == "/dev/vfio/noiommu-0"
    assert f"echo Y > {NOIOMMU}" in guest.at(RULE).read_text()
    assert bind(guest, Wish(persist=True, mode=0o600)) == [], "it is so already"
    unbind(guest)
    assert driver(guest) is None


BROKEN = {
    "the override": f"{pci.DEVICES}/{BDF}/driver_override",
    "the probe": "/sys/bus/pci/drivers_probe",
    "the permissions": "/dev/vfio/noiommu-0",
    "the rule": RULE,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_was_done_is_undone_when_a_step_fails(guest: Guest, broken: str) -> None:
    guest.add(group=None, driver="uio_pci_generic")
    guest.has_driver("vfio-pci")
    guest.make(NOIOMMU, "N\n")
    if broken == "the rule":
        guest.make("/etc/udev", "not a directory")
    else:
        guest.broken.add(BROKEN[broken])
    before = guest.snapshot()
    said: list[str] = []
    wish = Wish(unsafe_noiommu=True, mode=0o666, persist=True)
    steps = binding.bound(guest, pci.named(guest, None), wish)
    with pytest.raises(Refused, match=BROKEN[broken]):
        carry_out(steps, said.append, dry_run=False)
    assert guest.snapshot() == before
    assert driver(guest) == "uio_pci_generic"
    done = [line.removeprefix("+ ") for line in said if line.startswith("+")][:-1]
    assert len(done) >= 2
    undone = [line.removeprefix("- undone: ") for line in said if line.startswith("-")]
    assert undone == done[::-1]


@pytest.mark.parametrize("lines", range(6))
def test_what_was_done_is_undone_when_nobody_reads(guest: Guest, lines: int) -> None:
    """As with ``ivsmc bind | head -2``: each line may be the last that somebody reads."""
    guest.add(group=None, driver="uio_pci_generic")
    guest.has_driver("vfio-pci")
    guest.make(NOIOMMU, "N\n")
    before = guest.snapshot()
    read: list[str] = []

    def say(text: str) -> None:
        if len(read) == lines:
            raise BrokenPipeError
        read.append(text)

    wish = Wish(unsafe_noiommu=True, mode=0o666, persist=True)
    steps = binding.bound(guest, pci.named(guest, None), wish)
    with pytest.raises(BrokenPipeError):
        carry_out(steps, say, dry_run=False)
    assert len(read) == lines
    assert guest.snapshot() == before


def test_a_device_that_vfio_does_not_take(guest: Guest) -> None:
    """The probe itself says nothing: the driver that is not there does."""
    path = guest.add(group=None)
    guest.make(NOIOMMU, "Y\n")
    guest.has_driver("vfio-pci")
    found = pci.named(guest, None)
    steps = binding.bound(guest, found, Wish(unsafe_noiommu=True))
    next(steps).do()
    guest.make(NOIOMMU, "N\n")
    with pytest.raises(Refused, match=r"not taken by vfio-pci but by no driver.*dmesg"):
        carry_out(steps, lambda _: None, dry_run=False)
    assert guest.read(f"{path}/driver_override") == "vfio-pci"


def test_a_dry_run_changes_nothing(guest: Guest) -> None:
    guest.add(group=None)
    before = guest.snapshot()
    steps = bind(guest, Wish(unsafe_noiommu=True, mode=0o666, persist=True, dry_run=True))
    assert steps[0] == "modprobe vfio-pci"
    assert "chmod 666 /dev/vfio/noiommu-N" in steps
    assert steps[-1].startswith(f"cat > {RULE}")
    assert guest.snapshot() == before


def test_a_missing_module_is_named(guest: Guest) -> None:
    guest.add()
    guest.modules.clear()
    before = guest.snapshot()
    with pytest.raises(Refused, match=r"Module vfio-pci not found.*install the kernel's modules"):
        bind(guest)
    assert guest.snapshot() == before


def test_others_in_its_iommu_group(guest: Guest) -> None:
    guest.add()
    guest.add("0000:00:1c.0", numbers=(0x8086, 0x3420), kind=0x060400, driver="pcieport")
    bind(guest)
    unbind(guest)
    guest.add("0000:00:06.0", numbers=(0x1AF4, 0x1041), kind=0x020000, driver="virtio-pci")
    with pytest.raises(Refused, match=r"also holds 0000:00:06\.0, which the driver virtio-pci"):
        bind(guest)


def test_a_device_in_use_is_not_unbound(guest: Guest) -> None:
    guest.add()
    bind(guest)
    guest.busy.add("/dev/vfio/3")
    with pytest.raises(Refused, match=r"has 0000:00:05.0 open.*fuser -v /dev/vfio/3"):
        unbind(guest)
    assert driver(guest) == "vfio-pci"


def test_a_container_without_the_node(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.add()
    monkeypatch.setattr(
        guest, "exists", lambda path: "/dev/" not in path and Guest.exists(guest, path)
    )
    with pytest.raises(Refused, match=r"no /dev/vfio/3: in a container"):
        bind(guest)
    assert driver(guest) is None


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("0000:00:04.0", "is 1af4:1000, not an ivshmem device .*left alone.*here: 0000:00:05.0"),
        ("0000:00:09.0", "no PCI device 0000:00:09.0; ivshmem devices here: 0000:00:05.0"),
        ("eth0", "'eth0' is no PCI address"),
        ("0000:00:05.8", "is no PCI address"),
        ("../../../etc", "is no PCI address"),
    ],
)
def test_only_ivshmem_devices_are_touched(guest: Guest, device: str, words: str) -> None:
    guest.add()
    guest.add("0000:00:04.0", numbers=(0x1AF4, 0x1000), driver="virtio-pci", group="4")
    before = guest.snapshot()
    with pytest.raises(Refused, match=words):
        bind(guest, device=device)
    assert guest.snapshot() == before


@pytest.mark.parametrize("device", [BDF, "00:05.0", f"vfio:{BDF}", "PCI:00:05.0", None])
def test_the_forms_of_an_address(guest: Guest, device: str | None) -> None:
    guest.add()
    assert pci.named(guest, device).address == BDF


def test_one_of_several_must_be_named(guest: Guest) -> None:
    with pytest.raises(Refused, match=r"no ivshmem device.*ivsmc qemu-args"):
        pci.named(guest, None)
    guest.add()
    guest.add("0000:00:06.0", group="4")
    with pytest.raises(Refused, match=r"name one: 0000:00:05.0, 0000:00:06.0"):
        pci.named(guest, None)


def test_revision_0_is_refused(guest: Guest) -> None:
    guest.add(revision=0)
    with pytest.raises(Refused, match=r"revision 0, of a QEMU before 2.6"):
        bind(guest)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("nobodies", "groupadd --system nobodies"),
        ("4294967295", "no number of a group"),
        ("99999999999", "no number of a group"),
    ],
)
def test_an_unknown_group(guest: Guest, group: str, words: str) -> None:
    guest.add()
    with pytest.raises(Refused, match=words):
        bind(guest, Wish(group=group))
    assert driver(guest) is None


@pytest.mark.parametrize("name", ["bind", "unbind"])
def test_an_ordinary_user_is_told_at_once(
    guest: Guest, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guest.add(driver="vfio-pci" if name == "unbind" else None)
    guest.modules.clear()
    guest.root_runs = False
    before = guest.snapshot()
    monkeypatch.setattr("ivsmc._cli.bind.Machine", lambda: guest)
    with pytest.raises(Refused, match=r"^this needs root \(sudo\)"):
        run_here(name)
    assert capsys.readouterr().out == ""
    assert run_here(name, "--dry-run") == 0
    assert f"echo {BDF} >" in capsys.readouterr().out
    assert guest.snapshot() == before


def test_the_command_without_a_device() -> None:
    if pci.find(Machine()):
        pytest.skip("this machine has an ivshmem device")
    for name in ("bind", "unbind"):
        result = command(name)
        assert result.returncode == 1
        assert result.stderr.startswith("ivsmc: this machine has no ivshmem device (PCI 1af4:1110)")
