"""Mixed load for as long as you like, with integrity, leak and latency-drift checks.

A listening process with threads and one with asyncio serve clients of four kinds: long streams both
ways, messages of all sizes on one session, sessions of one message each, and sessions of asyncio,
many at once. Every byte is compared. After each round nobody has a session: what is in use in the
region, descriptors, threads and memory of all processes must be what they were after the first one.
Meanwhile a plain client of the same listener measures what the machine itself does to round trips;
those of sessions may grow over the run by a factor more than its own do.

The last line is the verdict; the exit status is 0 if it is good.
"""

import argparse
import contextlib
import secrets
import statistics
import sys
import time

from killing.ground import Ground, Observer, ground
from soaking import clients, server
from soaking.clients import Order
from soaking.members import Failed, Member, Tally, Weight, total

LOADS = {
    "streams": (clients.streams, "server"),
    "questions": (clients.questions, "server"),
    "visits": (clients.visits, "server"),
    "tasks": (clients.tasks, "asyncio server"),
    "plain": (clients.questions_over_tcp, "server"),
}
"""What each client does, and which listening process serves it."""
FAULTS = {
    "byte": clients.mistaken,
    "descriptor": clients.hoarding_descriptors,
    "memory": clients.hoarding_memory,
}
"""What is done in the place of visits to see that it is found."""
GROWTH = 4 << 20
"""Bytes by which the memory of a process may grow after the first round."""
SPARE = 8
"""Descriptors and threads of the library and of asyncio that a process may keep for later."""
PATIENCE = 120.0
"""Seconds more than a round takes until a process that does not answer hangs."""
LEAST_SHARED = 0.9
"""Of the sessions; a run over TCP alone would prove nothing."""


class Soak:
    """The processes of one run, and what they said round by round."""

    def __init__(self, device: str, seed: int, fault: str | None) -> None:
        self.faults: list[str] = []
        self.tallies: dict[str, list[Tally]] = {name: [] for name in LOADS}
        self._weights: dict[str, list[Weight]] = {}
        self._seed = seed
        self._observer = Observer(device)
        self._members: list[Member] = []
        self._servers = {
            name: self._start(Member(name, prepare, device))
            for name, prepare in (("server", server.threads), ("asyncio server", server.tasks))
        }
        addresses = {}
        for name, one in self._servers.items():
            one.order("address")
            addresses[name] = one.answer(PATIENCE)
        loads = LOADS if fault is None else LOADS | {"visits": (FAULTS[fault], "server")}
        self._clients = {
            name: self._start(
                Member(
                    name,
                    clients.client,
                    load,
                    addresses[where],
                    "none" if name == "plain" else device,
                )
            )
            for name, (load, where) in loads.items()
        }
        # The plain client is in no region. Who is attached may keep an extent for its next session.
        self._at_rest = self._observer.before | {
            "live": self._observer.before["live"] + len(self._members) - 1,
            "listeners": self._observer.before["listeners"] + len(self._servers),
        }
        del self._at_rest["extents"]

    def _start(self, member: Member) -> Member:
        self._members.append(member)
        return member

    def round(self, number: int, seconds: float) -> None:
        """Have all clients work, then weigh everybody."""
        for index, one in enumerate(self._clients.values()):
            one.order(Order(seconds, self._seed + 1000 * number + index))
        for name, one in self._clients.items():
            tally, weight = one.answer(seconds + PATIENCE)
            self.tallies[name].append(tally)
            self._weights.setdefault(name, []).append(weight)
        for name, one in self._servers.items():
            one.order("weigh")
            _, weight = one.answer(PATIENCE)
            self._weights.setdefault(name, []).append(weight)
        census = self._observer.settled(self._at_rest)
        if not self._at_rest.items() <= census.items():
            self.faults.append(f"round {number}: {census} in the region, not {self._at_rest}")

    def judge(self, most_drift: float) -> str:
        """Look at all rounds; return what is worth to be said of them."""
        growth = 0
        for name, weights in self._weights.items():
            first, last = weights[0], weights[-1]
            growth = max(growth, last.private - first.private)
            if last.private - first.private > GROWTH:
                self.faults.append(f"{name}: {last.private - first.private} bytes of memory more")
            if max(last.descriptors - first.descriptors, last.threads - first.threads) > SPARE:
                self.faults.append(f"{name}: {last} after {first}")
        drifts = {name: drift(self.tallies[name]) for name in ("questions", "plain")}
        if drifts["questions"] > most_drift * max(drifts["plain"], 1.0):
            self.faults.append(f"round trips became slower: {drifts}")
        done = total([tally for name in LOADS if name != "plain" for tally in self.tallies[name]])
        if done.shared < LEAST_SHARED * done.sessions:
            self.faults.append(f"only {done.shared} of {done.sessions} sessions were shared memory")
        return (
            f"{done.sessions} sessions, {done.shared / max(done.sessions, 1):.1%} shared memory; "
            f"{done.bytes / 1e9:.2f} GB compared; memory {growth / 1024:+.0f} KiB; round trip "
            f"{median(self.tallies['questions']) * 1e6:.1f} us, {drifts['questions']:.2f} of what "
            f"it was (TCP {median(self.tallies['plain']) * 1e6:.1f} us, {drifts['plain']:.2f})"
        )

    def leave(self) -> None:
        """End all processes."""
        for member in reversed(self._members):
            member.leave()
        census = self._observer.after()
        if census != self._observer.before:
            self.faults.append(f"left over in the region: {census}")
        self._observer.leave()


def median(tallies: list[Tally]) -> float:
    """Return the median round trip in seconds, of the rounds' medians."""
    medians = [statistics.median(tally.round_trips) for tally in tallies if tally.round_trips]
    return statistics.median(medians) if medians else 0.0


def drift(tallies: list[Tally]) -> float:
    """Return the round trip of the last third of the rounds, in those of the first."""
    third = max(len(tallies) // 3, 1)
    return median(tallies[-third:]) / max(median(tallies[:third]), 1e-9)


def main() -> int:
    """Run and print the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of load (default: 60)")
    parser.add_argument("--rounds", type=int, default=10, help="in that time (default: 10)")
    parser.add_argument(
        "--device",
        default="local",
        help="local, file or host: made for the run; or the spec of a device (default: local)",
    )
    parser.add_argument("--seed", type=int, help="of an earlier run (default: a new one)")
    parser.add_argument("--size", type=int, default=256, help="MiB of the region (default: 256)")
    parser.add_argument(
        "--drift",
        type=float,
        default=1.5,
        help="factor by which round trips may grow over the run, beside TCP's (default: 1.5)",
    )
    parser.add_argument(
        "--fault", choices=FAULTS, help="make this wrong, to see that it is found; for tests"
    )
    options = parser.parse_args()
    if options.rounds < 2 or options.seconds <= 0:
        parser.error("--seconds above 0 and at least two --rounds: what grows is compared")
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}, device {options.device}", flush=True)
    with ground(options.device, options.size << 20) as here:
        return run(options, seed, here)


def run(options: argparse.Namespace, seed: int, here: Ground) -> int:
    """Run on a device that is there."""
    soak = Soak(here.spec, seed, options.fault)
    files = here.files()
    server_before = here.server_descriptors()
    begin = time.monotonic()
    summary = ""
    try:
        for number in range(options.rounds):
            soak.round(number, options.seconds / options.rounds)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        summary = soak.judge(options.drift)
        if here.files() - files:
            soak.faults.append(f"files are left over: {here.files() - files}")
        if here.server_descriptors() - server_before > SPARE:
            soak.faults.append(f"the ivshmem server keeps {here.server_descriptors()} descriptors")
    except Failed as failed:
        soak.faults.append(str(failed))
    except KeyboardInterrupt:
        soak.faults.append("interrupted")
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            soak.leave()
    for fault in soak.faults:
        print(f"FAULT: {fault}")
    verdict = f"FAILED, {len(soak.faults)} faults" if soak.faults else "OK, 0 faults"
    print(
        f"soak: {verdict}: {time.monotonic() - begin:.0f} s, {options.rounds} rounds; {summary}; "
        f"{options.device}, seed {seed}"
    )
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
