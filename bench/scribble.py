"""A hostile peer: scribble over a region while others stream, and see that they get over it.

Two pairs of processes stream to each other over one region; this process has it mapped, too, and
follows no rules. Rounds of two kinds take turns, each on a new region:

everywhere  random words, single bits, words from elsewhere and stale copies, into some kinds of
            places each: superblock, slots with their summary bits, host records, directory,
            intents, extents, cursors, flags and states of DMBs, data, or all of it. Both pairs
            may lose sessions, with an exception that is documented; what they receive may be
            wrong, as data is written over as well. They must not end, hang or spin.
one pair    only into what one pair has. The other pair must lose nothing.

After all rounds a region that nobody writes into must be as good as ever to all of them, and they
must hold what they held. The last line is the verdict; the exit status is 0 if it is good.
"""

import argparse
import contextlib
import multiprocessing
import random
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

from killing.ground import ground
from scribbling import victims
from scribbling.attacker import Attacker
from scribbling.layout import Region, Slot
from scribbling.victims import Begin, Run, Weigh
from soaking.members import Failed, Member, Weight

SIZE = 16 << 20
"""Bytes of the region: small, so that what is written hits something."""
PATIENCE = 120.0
"""Seconds until a process that does not answer hangs: many times what its calls may take."""
CALLS = 2.0
"""Seconds that a call of a victim may take."""
SPARED_CALLS = 60.0
"""The same of who is not written into: longer than any machine stands still."""
CALM = 1.0
"""Seconds of streams before and after everything that nobody meddles with."""
SPARE = 8
"""Descriptors and threads of the library that a process may keep for later."""
GROWTH = 8 << 20
"""Bytes by which the memory of a process may grow."""


class Pair:
    """Two processes that stream to each other."""

    def __init__(self, name: str) -> None:
        # Of the same context as the members' processes.
        self._stop = multiprocessing.get_context("spawn").Event()
        self.server = Member(f"{name}, server", victims.server, self._stop)
        self.client = Member(f"{name}, client", victims.client, self._stop)
        self.outcomes: Counter[str] = Counter()
        self.last: Counter[str] = Counter()

    def begin(self, device: str, calls: float, seed: int) -> set[Slot]:
        """Have them stream; return their slots."""
        self._stop.clear()
        self.server.order(Begin(device, calls))
        serving, address = self.server.answer(PATIENCE)
        self.client.order(Begin(device, calls, address))
        slots = {serving, self.client.answer(PATIENCE)}
        for one in (self.server, self.client):
            one.order(Run(seed))
        return slots

    def end(self) -> None:
        """Have them stop; keep how their sessions ended."""
        self._stop.set()
        self.last = Counter()
        for one in (self.client, self.server):
            self.last.update(one.answer(PATIENCE))
        self.outcomes.update(self.last)

    def weigh(self) -> list[Weight]:
        """Return what they hold."""
        weights = []
        for one in (self.server, self.client):
            one.order(Weigh())
            weights.append(one.answer(PATIENCE))
        return weights

    def leave(self) -> None:
        """End both."""
        self.client.leave()
        self.server.leave()


class Scribble:
    """All rounds, and what was found wrong in them."""

    def __init__(self, where: Path, seed: int, *, does_harm: bool) -> None:
        self.faults: list[str] = []
        self.written = 0
        self._regions = 0
        self._where = where
        self._random = random.Random(seed)
        self._does_harm = does_harm
        self.victims = Pair("a victim")
        self.spared = Pair("a spared one")
        self._weights = self._rest()

    def _round(self, name: str, count: int, *, is_everywhere: bool) -> None:
        """Write ``count`` words while both pairs stream."""
        # A name of its own: a file: device that is open stays what it was when its name is reused.
        self._regions += 1
        path = self._where / f"region-{self._regions}"
        with path.open("wb") as file:
            file.truncate(SIZE)
        device = f"file:{path}"
        seeds = [self._random.getrandbits(60) for _ in range(3)]
        try:
            calls = CALLS if count and is_everywhere else SPARED_CALLS
            spared = self.spared.begin(device, calls, seeds[0])
            slots = self.victims.begin(device, CALLS if count else SPARED_CALLS, seeds[1])
            with contextlib.closing(Region(path)) as region:
                attacker = Attacker(region, random.Random(seeds[2]))
                if is_everywhere:
                    attacker.everywhere(count)
                elif self._does_harm:
                    attacker.into(spared, count, data_only=True)
                else:
                    attacker.into(slots, count)
            self.written += count
            if not count:
                time.sleep(CALM)
        finally:
            for pair in (self.victims, self.spared):
                pair.end()
            path.unlink()
        strict = [self.spared] if count else [self.spared, self.victims]
        if not is_everywhere or not count:
            for pair in strict:
                self._judge(name, pair.last)

    def _judge(self, name: str, outcomes: Counter[str]) -> None:
        """Nothing may be lost where nobody writes."""
        lost = {
            what: count for what, count in outcomes.items() if what not in {"whole", "over tcp"}
        }
        if lost or not outcomes["whole"]:
            self.faults.append(f"{name}: who was not written into: {dict(outcomes)}")

    def _rest(self) -> list[Weight]:
        """Return what all hold after sessions that nobody meddled with."""
        self._round("in peace", 0, is_everywhere=False)
        return [weight for pair in (self.victims, self.spared) for weight in pair.weigh()]

    def run(self, count: int, rounds: int) -> None:
        """Write ``count`` words in so many rounds; then see that all is as before."""
        for number in range(rounds):
            share = count // rounds + (count % rounds if number == 0 else 0)
            self._round(f"round {number}", share, is_everywhere=number % 2 == 0)
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for before, after in zip(self._weights, self._rest(), strict=True):
            if (
                after.descriptors - before.descriptors > SPARE
                or after.threads - before.threads > SPARE
                or after.private - before.private > GROWTH
            ):
                self.faults.append(f"a victim holds {after}, before {before}")

    def leave(self) -> None:
        """End all processes."""
        self.victims.leave()
        self.spared.leave()


def main() -> int:
    """Run and print the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--iterations", type=int, default=1_000_000, help="words written (default: 1,000,000)"
    )
    parser.add_argument(
        "--rounds", type=int, help="at least 2, each on a new region (default: one per 25,000)"
    )
    parser.add_argument("--seed", type=int, help="of an earlier run (default: a new one)")
    parser.add_argument(
        "--harm",
        action="store_true",
        help="write into the data of the spared pair instead; for tests",
    )
    options = parser.parse_args()
    rounds = max(options.rounds or options.iterations // 25_000, 2)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with ground("none", SIZE) as here:
        begin = time.monotonic()
        scribble = None
        faults: list[str] = []
        try:
            scribble = Scribble(here.where, seed, does_harm=options.harm)
            scribble.run(options.iterations, rounds)
        except Failed as failed:
            faults.append(str(failed))
        except KeyboardInterrupt:
            faults.append("interrupted")
        finally:
            if scribble is not None:
                scribble.leave()
                faults += scribble.faults
        for fault in faults:
            print(f"FAULT: {fault}")
        verdict = f"FAILED, {len(faults)} faults" if faults else "OK, 0 faults"
        summary = ""
        if scribble is not None:
            summary = (
                f"{scribble.written} scribbles in {rounds} rounds; "
                f"victims' ends of sessions {shown(scribble.victims.outcomes)}; "
                f"spared {shown(scribble.spared.outcomes)}; "
            )
        print(f"scribble: {verdict}: {summary}{time.monotonic() - begin:.0f} s, seed {seed}")
        return 1 if faults else 0


def shown(outcomes: Counter[str]) -> str:
    """Return them in one line."""
    return ", ".join(f"{count} {what}" for what, count in outcomes.most_common())


if __name__ == "__main__":
    sys.exit(main())
