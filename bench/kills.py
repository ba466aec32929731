"""Kill processes at random moments, and see that nothing is lost and nobody is hurt.

Worker processes listen, connect to each other and exchange streams that both ends know, in every
way that a user's program might: blocking, with timeouts, by readiness, with asyncio. Most are
killed (SIGKILL) by a timer somewhere inside their calls; some are stopped for a while, some leave
by themselves, a few live to the end. Every end checks each byte it receives, that a stream ends
where its sender ended it, and that it breaks off only when the peer was killed, or broke it off on
purpose; all that a killed peer had sent must have come then. At the end what is in use in the
region is counted, and what the survivors and the ivshmem server hold.

The last line is the verdict; the exit status is 0 if it is good.

From the seed alone follow: what every worker and every session does, the number of the call that a
worker is killed before or in and the nanoseconds from there. Which worker meets which, and what
others are doing at that moment, is up to the machine.
"""

import argparse
import secrets
import sys
import time

from killing.board import Board
from killing.controller import Controller
from killing.ends import World
from killing.ground import Ground, Observer, ground, leak

FAULTS = ("byte", "reset", "hang", "descriptor", "leak")
LEAST_SHARED = 0.5
"""Of all sessions; a run over TCP alone would prove nothing."""


def main() -> int:
    """Run and print the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=500, help="kills (default: 500)")
    parser.add_argument(
        "--device",
        default="local",
        help="local, file or host: made for the run; or the spec of a device (default: local)",
    )
    parser.add_argument("--seed", type=int, help="of an earlier run (default: a new one)")
    parser.add_argument("--processes", type=int, default=8, help="at once (default: 8)")
    parser.add_argument("--survivors", type=int, default=2, help="never killed (default: 2)")
    parser.add_argument("--size", type=int, default=64, help="MiB of the region (default: 64)")
    parser.add_argument(
        "--patience",
        type=int,
        default=200_000,
        help="steps of all others in which one that makes none hangs (default: 200,000)",
    )
    parser.add_argument(
        "--fault", choices=FAULTS, help="make this wrong, to see that it is found; for tests"
    )
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    print(f"seed {seed}, device {options.device}", flush=True)
    with ground(options.device, options.size << 20) as here:
        return run(options, seed, here)


def run(options: argparse.Namespace, seed: int, here: Ground) -> int:
    """Run on a device that is there."""
    files_before = here.files()
    observer = Observer(here.spec)
    world = World(Board(), seed, here.spec, World.noise_of(seed), options.fault)
    controller = Controller(world, options.processes, options.survivors, options.patience)
    totals = controller.totals
    server_before = here.server_descriptors()
    begin = time.monotonic()
    try:
        controller.run(options.iterations)
    except KeyboardInterrupt:
        totals.faults.append("interrupted")
    seconds = time.monotonic() - begin
    census = observer.after()
    if options.fault == "leak":
        with leak(here.spec):
            census = observer.now()
    if census != observer.before:
        totals.faults.append(f"left over in the region: {census}, before: {observer.before}")
    # It keeps the eventfd of an id for the next one that gets it. When a worker is started the
    # one before may still have its id.
    server_kept = here.server_descriptors() - server_before
    if server_kept > 2 * options.processes:
        totals.faults.append(f"the ivshmem server keeps {server_kept} descriptors")
    observer.leave()
    if files := here.files() - files_before:
        totals.faults.append(f"files are left over: {files}")
    counts = totals.lanes
    sessions = counts["shared"] + counts["plain"]
    if counts["shared"] < LEAST_SHARED * sessions:
        totals.faults.append("most sessions went over TCP")
    for note, count in sorted(totals.notes.items()):
        print(f"{count:>8} {note}")
    for fault in totals.faults:
        print(f"FAULT: {fault}")
    verdict = f"FAILED, {len(totals.faults)} faults" if totals.faults else "OK, 0 faults"
    print(
        f"kills: {verdict}: {totals.kills} kills, {totals.left} left, {totals.pauses} pauses; "
        f"{sessions} sessions, {counts['shared'] / max(sessions, 1):.1%} shared memory, "
        f"{counts['lost']} lost their peer; {counts['bytes'] / 1e9:.2f} GB checked; "
        f"{totals.kills / seconds:.0f} kills/s; {options.device}, seed {seed}"
    )
    return 1 if totals.faults else 0


if __name__ == "__main__":
    sys.exit(main())
