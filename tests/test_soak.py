"""Mixed load: ``bench/soak.py`` finds nothing, and finds what is made wrong on purpose."""

import re

import pytest

from benches import look_for_faults


def soak(*arguments: object) -> tuple[int, str]:
    # How much slower round trips become in seconds is for runs of hours to say.
    return look_for_faults("soak.py", "--drift", 1000, *arguments)


@pytest.mark.parametrize("device", ["local", "file", "host"])
def test_mixed_load_leaves_nothing(device: str) -> None:
    status, said = soak("--device", device, "--seconds", 4, "--rounds", 4)
    assert status == 0, said
    counted = re.match(r"soak: OK, 0 faults: .* (\d+) sessions, ", said.splitlines()[-1])
    assert counted, said
    assert int(counted[1]) > 0


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("byte", "wrong bytes among the"),
        ("descriptor", "visits: Weight("),
        ("memory", "bytes of memory more"),
    ],
)
def test_what_is_wrong_is_found(fault: str, words: str) -> None:
    status, said = soak("--seconds", 1, "--rounds", 2, "--fault", fault)
    assert status == 1
    assert words in said
    assert re.match(r"soak: FAILED, \d+ faults: ", said.splitlines()[-1])
