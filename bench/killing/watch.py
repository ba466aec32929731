"""Decides that a worker hangs, by what others get done in the meantime."""

import faulthandler
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from killing.board import LANES, Area, Board, Doing, Lane

_STEPS_A_TURN = 400
"""A lane must make a step in ``patience`` steps of all, and in the turns of the controller that
these would take at so many a turn: a machine that stops for a while does not make anybody hang."""
_TURNS_OF_ALL = 3000
"""Turns of the controller in which anybody at all must make a step."""


@dataclass
class _Since:
    """When a lane was first seen at the step it is at."""

    step: tuple[int, int]
    turn: int
    all_steps: int


class Watch:
    """Looks at the lanes, turn by turn."""

    def __init__(self, board: Board, patience: int) -> None:
        self.has_found = False
        self._board = board
        self._patience = patience
        self._turn = 0
        self._gone_steps = 0
        self._seen: dict[tuple[int, int], _Since] = {}
        self._all_since = (0, 0)

    def prepare_worker(self) -> None:
        """Have the calling worker show its stacks when it is asked to."""
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)

    def count_gone(self, area: Area) -> None:
        """Keep the steps of a worker that has ended."""
        self._gone_steps += sum(area.lane(index).words[Lane.STEPS] for index in range(LANES))

    def look(self, workers: dict[int, int]) -> str | None:
        """Take a turn; say which of the workers (name by process id) hangs, if one does."""
        self._turn += 1
        if self._turn % 10:
            return None
        steps = {}
        for name in workers.values():
            area = self._board.area(name)
            for index in range(LANES):
                words = area.lane(index).words
                steps[name, index] = (words[Lane.STEPS], words[Lane.DOING])
        all_steps = self._gone_steps + sum(made for made, _ in steps.values())
        if all_steps != self._all_since[0]:
            self._all_since = (all_steps, self._turn)
        hanging = []
        seen = {}
        for lane, step in steps.items():
            if step[1] == Doing.NOTHING:
                continue
            since = self._seen.get(lane)
            if since is None or since.step != step:
                since = _Since(step, self._turn, all_steps)
            elif (
                all_steps - since.all_steps > self._patience
                and self._turn - since.turn > self._patience // _STEPS_A_TURN
            ):
                hanging.append((*lane, Doing(step[1])))
            seen[lane] = since
        self._seen = seen
        if hanging:
            return self._show(workers, hanging, f"{self._patience} steps of others")
        if self._turn - self._all_since[1] > _TURNS_OF_ALL:
            busy = [(*lane, Doing(step[1])) for lane, step in steps.items() if step[1]]
            return self._show(workers, busy, "as long as nobody made a step")
        return None

    def _show(
        self, workers: dict[int, int], hanging: list[tuple[int, int, Doing]], how_long: str
    ) -> str:
        """Write where everybody is to standard error."""
        self.has_found = True
        for pid, name in workers.items():
            print(f"\n=== worker {name:#x}, process {pid}", file=sys.stderr)
            for index in range(LANES):
                _, doing, key, *_ = self._board.area(name).lane(index).words
                if doing:
                    session = self._board.record(key) if key else "a session not known yet"
                    print(f"lane {index}: {Doing(doing).name}, {session}", file=sys.stderr)
            for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
                try:
                    where = (task / "wchan").read_text()
                    stack = (task / "stack").read_text()
                except OSError as error:
                    where, stack = "?", f"{error}\n"
                print(f"thread {task.name} in {where}\n{stack}", end="", file=sys.stderr)
            sys.stderr.flush()
            os.kill(pid, signal.SIGUSR1)

            time.sleep(0.2)  # so that what they write does not mix
        lanes = ", ".join(f"{doing.name} in {name:#x}" for name, _, doing in hanging)
        return f"hangs for {how_long}: {lanes}; see above where"
