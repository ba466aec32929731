"""Seeded kills: ``bench/kills.py`` finds nothing, and finds what is made wrong on purpose."""

import re

import pytest

from benches import look_for_faults

KILLS = {"local": 160, "file": 170, "host": 170}


@pytest.mark.parametrize("device", KILLS)
def test_nothing_is_lost_and_nobody_is_hurt(device: str) -> None:
    status, said = look_for_faults("kills.py", "--device", device, "--iterations", KILLS[device])
    assert status == 0, said
    verdict = said.splitlines()[-1]
    counted = re.match(r"kills: OK, 0 faults: (\d+) kills, .* (\d+) sessions, ", verdict)
    assert counted, verdict
    assert int(counted[1]) >= KILLS[device]
    assert int(counted[2]) >= KILLS[device]


@pytest.mark.parametrize(
    ("fault", "words", "options"),
    [
        ("byte", "wrong bytes among the", ("--survivors", 4)),
        ("reset", "broke off, and its peer lives", ("--survivors", 4)),
        ("hang", "CONNECT in 0x", ("--patience", 5000, "--iterations", 100_000)),
        ("descriptor", "descriptors are left over", ()),
        ("leak", "left over in the region", ()),
    ],
)
def test_what_is_wrong_is_found(fault: str, words: str, options: tuple[object, ...]) -> None:
    status, said = look_for_faults(
        "kills.py", "--device", "local", "--fault", fault, "--iterations", 10, *options
    )
    assert status == 1
    assert words in said
    assert re.match(r"kills: FAILED, \d+ faults: ", said.splitlines()[-1])
