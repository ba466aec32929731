"""Where what is in a region (rust/proto/PROTOCOL.md), in words of 64 bits."""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SUPERBLOCK = 4096 // 8
_SLOT, _HOST, _DIRECTORY, _DETAILS, _INTENT, _CONTROL = (
    size // 8 for size in (256, 1024, 8, 64, 128, 320)
)
_GRANULE = 16 * 1024 // 8
_CONTROL_WORDS = (0, 8, 9, 16, 17, 24, 32)
"""State, produced, writer flags, consumed, reader flags, both wait words."""


@dataclass(frozen=True)
class Slot:
    """A slot reference."""

    index: int
    generation: int


class Region:
    """A region of a file, mapped by somebody who follows no rules."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._mapping = mmap.mmap(file.fileno(), 0)
        self.words = memoryview(self._mapping).cast("Q")
        # Read once, before anything is written over it.
        (
            self._slots,
            self._slots_at,
            self._hosts_at,
            self._entries,
            self._directory_at,
            self._details_at,
            self._intents_at,
            self._extents,
            self._extent_bytes,
            self._extent_words_at,
            self._control_at,
            self._extents_at,
        ) = self.words[6:18]

    def close(self) -> None:
        """Unmap it."""
        self.words.release()
        self._mapping.close()

    def superblock(self) -> range:
        """Return the words of the superblock."""
        return range(_SUPERBLOCK)

    def slots(self) -> range:
        """Return those of the peer slots, with their summary bits."""
        return _words(self._slots_at, self._slots * _SLOT)

    def hosts(self) -> range:
        """Return those of the host records."""
        return _words(self._hosts_at, self._slots * _HOST)

    def directory(self) -> range:
        """Return those of the directory and its details."""
        return _words(self._directory_at, self._entries * (_DIRECTORY + _DETAILS))

    def intents(self) -> range:
        """Return those of the intents."""
        return _words(self._intents_at, self._entries * _INTENT)

    def extents(self) -> range:
        """Return the extent words."""
        return _words(self._extent_words_at, self._extents)

    def controls(self, extents: list[int]) -> list[int]:
        """Return the words of the control blocks in use in these extents."""
        per_extent = self._extent_bytes // 8 // _GRANULE
        found = []
        for extent in extents:
            for granule in range(extent * per_extent, (extent + 1) * per_extent):
                at = self._control_at // 8 + granule * _CONTROL
                if self.words[at]:
                    found += [at + word for word in _CONTROL_WORDS]
        return found

    def data(self, extents: list[int]) -> list[int]:
        """Return some of the words of the rings in these extents, everywhere in them."""
        per_extent = self._extent_bytes // 8
        return [
            self._extents_at // 8 + extent * per_extent + granule + word
            for extent in extents
            for granule in range(0, per_extent, _GRANULE)
            for word in range(0, _GRANULE, 61)
        ]

    def open_extents(self) -> dict[int, Slot]:
        """Return the owners of those extents that are open."""
        found = {}
        for index, at in enumerate(self.extents()):
            word = self.words[at]
            if word >> 39 & 1 and word & 1:
                found[index] = Slot(word >> 1 & 0xFFF, word >> 13 & 0x3FFFFFF)
        return found

    def belongings(self, slots: set[Slot]) -> Iterator[list[int]]:
        """Yield the words of what these slots have, kind by kind."""
        own = [extent for extent, slot in self.open_extents().items() if slot in slots]
        yield self.controls(own)
        yield self.data(own)
        yield [self._extent_words_at // 8 + extent for extent in own]
        for at, size in ((self._slots_at, _SLOT), (self._hosts_at, _HOST)):
            yield [at // 8 + slot.index * size + word for slot in slots for word in range(size)]


def _words(at: int, count: int) -> range:
    return range(at // 8, at // 8 + count)
