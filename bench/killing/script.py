"""What workers and sessions do, each from the seed and its own name alone."""

import random
from dataclasses import dataclass

RINGS = (16 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
"""Buffer sizes in bytes; the smallest twice, as there both ends wait most."""
LARGEST_STREAM = 1 << 20
LONGEST_LIFE = 1500
"""Calls of one lane before its worker is killed, at most."""


def logarithmic(chance: random.Random, largest: int) -> int:
    """Choose a number from 0 to ``largest``, each order of magnitude as likely as others."""
    return min(int(2 ** chance.uniform(0, largest.bit_length())) - 1, largest)


@dataclass(frozen=True)
class Moment:
    """A moment of a worker's life: before a call of one of its lanes, and a while after that."""

    lane: int
    step: int
    delay: int
    """Nanoseconds from the beginning of that call."""

    @classmethod
    def of(cls, chance: random.Random, lanes: int) -> "Moment":
        """Choose a moment of the life of a worker with so many client lanes."""
        return cls(
            lane=chance.randrange(lanes),
            step=logarithmic(chance, LONGEST_LIFE),
            delay=1 + logarithmic(chance, 2_000_000),
        )


@dataclass(frozen=True)
class Life:
    """What one worker does, and how it ends."""

    lanes: int
    """Lanes that connect."""
    is_asynchronous: bool
    """Tasks of asyncio instead of threads."""
    ring: int
    """Bytes of its listener's buffers."""
    kill: Moment | None
    """When it is killed; None: never."""
    leaves: bool
    """At that moment it begins to leave properly, and is killed while it does; or is faster."""
    pause: Moment | None
    """When it is stopped for ``pause_seconds``, or killed after them."""
    pause_seconds: float
    killed_in_pause: bool
    relistens: bool
    """It closes its listener now and then, and opens another."""

    @classmethod
    def of(cls, seed: int, number: int, is_mortal: bool) -> "Life":
        """Choose the life of the incarnation ``number``."""
        chance = random.Random(f"life {seed} {number}")
        lanes = chance.randrange(1, 4)
        pause = Moment.of(chance, lanes) if chance.random() < 0.15 else None
        return cls(
            lanes=lanes,
            is_asynchronous=chance.random() < 0.25,
            ring=chance.choice(RINGS),
            kill=Moment.of(chance, lanes) if is_mortal else None,
            leaves=chance.random() < 0.15,
            pause=pause,
            pause_seconds=logarithmic(chance, 250) / 1000,
            killed_in_pause=is_mortal and chance.random() < 0.3,
            relistens=chance.random() < 0.3,
        )


@dataclass(frozen=True)
class Script:
    """What both ends of one session do."""

    turns: tuple[tuple[bool, int], ...]
    """Who sends how much, one after the other: (the client?, bytes); empty: both at once."""
    sizes: tuple[int, int]
    """Bytes of the client's stream and of the server's."""
    starts: tuple[int, int]
    """Where in the noise they begin."""
    closes_first: bool | None
    """Who closes when it has everything, the client (True) or the server; None: both shut down."""
    breaks_off: tuple[bool, int] | None
    """Who closes in the middle, and after how many calls."""

    @classmethod
    def of(cls, seed: int, name: str, period: int) -> "Script":
        """Choose the script of the session ``name``; its streams begin within ``period`` bytes."""
        chance = random.Random(f"session {seed} {name}")
        turns: tuple[tuple[bool, int], ...] = ()
        if chance.random() < 0.4:
            count = chance.randrange(1, 12)
            turns = tuple(
                (chance.random() < 0.5, logarithmic(chance, LARGEST_STREAM // 4))
                for _ in range(count)
            )
            sizes = (
                sum(size for is_client, size in turns if is_client),
                sum(size for is_client, size in turns if not is_client),
            )
        else:
            sizes = (logarithmic(chance, LARGEST_STREAM), logarithmic(chance, LARGEST_STREAM))
        breaks_off = None
        if chance.random() < 0.1:
            breaks_off = (chance.random() < 0.5, logarithmic(chance, 50))
        return cls(
            turns=turns,
            sizes=sizes,
            starts=(chance.randrange(period), chance.randrange(period)),
            closes_first=chance.choice((None, None, True, False)),
            breaks_off=breaks_off,
        )
