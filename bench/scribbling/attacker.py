"""Writes what no peer should."""

import random
import time
from collections.abc import Callable, Sequence

from scribbling.layout import Region, Slot

_MASK = (1 << 64) - 1
_BURST = 2000
"""Words at most that are written without a pause."""
_PAUSE = 0.01
"""Seconds at most between bursts, so that victims get somewhere."""
_WEIGHTS = (4, 2, 1, 1, 1)
"""How often which kind of belongings is written into: control blocks, data, and what ends all."""
_STALE = 512
"""Words of a copy that is written back later."""


class Attacker:
    """Scribbles over a region as a seed says."""

    def __init__(self, region: Region, rng: random.Random) -> None:
        self._region = region
        self._random = rng
        self._copies: list[tuple[int, list[int]]] = []
        self._values: list[Callable[[int], int]] = [
            lambda _: rng.getrandbits(64),
            lambda _: 0,
            lambda _: _MASK,
            lambda word: word ^ 1 << rng.randrange(64),
            lambda word: word + rng.randrange(-70_000, 70_000),
            lambda word: word & rng.getrandbits(64),
            lambda _: region.words[rng.randrange(len(region.words))],
            lambda _: rng.getrandbits(16),
        ]

    def everywhere(self, count: int) -> None:
        """Write ``count`` words into some kinds of places, whosever they are."""
        region = self._region

        def in_use(words: Callable[[list[int]], list[int]]) -> Callable[[], Sequence[int]]:
            return lambda: words(list(region.open_extents()) or [0])

        kinds: list[Callable[[], Sequence[int]]] = [
            in_use(region.controls),
            in_use(region.data),
            region.slots,
            region.hosts,
            region.directory,
            region.intents,
            region.extents,
            region.superblock,
            lambda: range(len(region.words)),
        ]
        # After all kinds at once there is little left to look at but fallbacks.
        kinds = self._random.sample(kinds, self._random.randrange(1, 4))
        may_go_back = self._random.random() < 0.25
        self._write(count, lambda: self._random.choice(kinds)(), may_go_back=may_go_back)

    def into(self, slots: set[Slot], count: int, *, data_only: bool = False) -> None:
        """Write ``count`` words into what these slots have, and nowhere else."""
        weights = (0, 1, 0, 0, 0) if data_only else _WEIGHTS

        def places() -> Sequence[int]:
            belongings = list(self._region.belongings(slots))
            return self._random.choices(belongings, weights)[0]

        self._write(count, places, may_go_back=False)

    def _write(self, count: int, places: Callable[[], Sequence[int]], may_go_back: bool) -> None:
        rng, words = self._random, self._region.words
        while count > 0:
            time.sleep(rng.uniform(0, _PAUSE))
            if may_go_back and rng.random() < 0.1:
                count -= self._go_back()
                continue
            where = places()
            if not where:
                continue
            burst = min(int(2 ** rng.uniform(0, _BURST.bit_length())), count)
            value = rng.choice(self._values)
            for at in rng.choices(where, k=burst):
                words[at] = value(words[at]) & _MASK
            count -= burst

    def _go_back(self) -> int:
        """Write back what stood somewhere a while ago; return how many words."""
        rng, words = self._random, self._region.words
        at = rng.choice([0, rng.randrange(len(words) - _STALE), rng.choice(self._region.slots())])
        self._copies.append((at, words[at : at + _STALE].tolist()))
        at, copy = self._copies.pop(rng.randrange(len(self._copies)))
        if len(self._copies) < 8:
            self._copies.append((at, copy))
        for offset, word in enumerate(copy):
            words[at + offset] = word
        return len(copy)
