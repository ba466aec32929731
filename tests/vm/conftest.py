"""The test bed, for the tests that need guests.

It is booted once for all of them, under software emulation. Where that cannot be, they are skipped
with the reason; ``IVSMC_REQUIRE_VM=1`` makes that a failure.
"""

from collections.abc import Iterator

import pytest

from vm import guest
from vm.bed import Bed, test_bed


@pytest.fixture(scope="session")
def bed() -> Iterator[Bed]:
    """The test bed, up and idle."""
    if reason := guest.missing():
        pytest.skip(reason)
    kernel = guest.find_kernel()
    assert kernel is not None
    with test_bed(kernel) as bed:
        yield bed


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """In place of the one that looks at pytest's process: the sessions are in others."""
