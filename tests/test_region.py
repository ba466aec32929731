"""``ivsmc region``: who is in a region, and declaring one of them dead."""

import json

import pytest

import ivsmc
from commands import command
from processes import Here, running


def stay(here: Here, spec: str) -> None:
    """Be attached to ``spec``; say which slot that is."""
    with ivsmc.open_device(spec) as device:
        here.send(device.stats()["slot"])
        here.receive()


def test_what_is_in_a_region(shared_device: str) -> None:
    with running(stay, shared_device) as peer:
        slot = peer.receive()
        result = command("region", shared_device, "--json")
        assert (result.returncode, result.stderr) == (0, "")
        report = json.loads(result.stdout)
        slots = {entry["slot"]: entry for entry in report["slots"]}
        assert report["census"]["live"] == len(slots) >= 2
        assert (slots[slot]["state"], slots[slot]["same_boot"]) == ("live", True)
        assert [entry["own"] for entry in slots.values()].count(True) == 1
        if shared_device.startswith("host:"):
            assert slots[slot]["prover"] == "ivposition"
        table = command("region", shared_device)
        assert table.returncode == 0
        rows = {line.split()[0]: line for line in table.stdout.splitlines() if "." in line[:6]}
        assert "this machine" in rows[slot]
        peer.send(None)


def test_declaring_a_slot_dead(shared_device: str) -> None:
    with running(stay, shared_device) as peer:
        slot = peer.receive()
        asked = command("region", shared_device, "--declare-dead", slot)
        assert asked.returncode == 1
        assert "If it runs on, it writes into memory of other sessions" in asked.stderr
        assert "add --yes" in asked.stderr
        before = json.loads(command("region", shared_device, "--json").stdout)
        assert slot in [entry["slot"] for entry in before["slots"]]
        sure = command("region", shared_device, "--declare-dead", slot, "--yes", "--json")
        assert (sure.returncode, sure.stderr) == (0, "")
        after = json.loads(sure.stdout)
        assert after["declared_dead"] == slot
        assert slot not in [entry["slot"] for entry in after["slots"]]
        peer.kill()


@pytest.mark.parametrize("slot", ["999.1", "0", "x.y", "-1.0"])
def test_what_is_no_slot(slot: str, shared_device: str) -> None:
    result = command("region", shared_device, f"--declare-dead={slot}", "--yes")
    assert result.returncode == 1
    assert f"no slot {slot} is in use" in result.stderr


def test_a_device_that_is_not_there() -> None:
    result = command("region", "file:/nonexistent/region")
    assert result.returncode == 1
    assert "there is no such file" in result.stderr


def test_yes_alone() -> None:
    assert command("region", "local", "--yes").returncode == 2
