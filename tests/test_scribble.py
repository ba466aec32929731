"""A hostile peer: ``bench/scribble.py`` finds nobody harmed, and finds it when somebody is."""

import re

from benches import look_for_faults


def test_victims_get_over_it_and_others_are_spared() -> None:
    status, said = look_for_faults("scribble.py", "--iterations", 200_000, "--rounds", 6)
    assert status == 0, said
    assert re.match(
        r"scribble: OK, 0 faults: 200000 scribbles in 6 rounds; ", said.splitlines()[-1]
    )


def test_harm_is_found() -> None:
    status, said = look_for_faults("scribble.py", "--iterations", 50_000, "--rounds", 4, "--harm")
    assert status == 1
    assert "who was not written into" in said
