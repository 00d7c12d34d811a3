"""When an elastic run is given up: when it does not get past a step, whatever each try ends by.

A try is a generation that ended by the death of a worker or by an error of the recipe. It has made progress if it got
farther than all before it, in memory or in the checkpoint that it began with. Deaths by preemption do not count: the
supervisor dies as well, or had a notice.

    generation   began with   got to    progress   tries at this step   tries in all
        1             0          4         yes             1                 1
        2             0          4         no              2                 2
        3             0          4         no              3 = MAX_TRIES_PER_STEP: given up

A run whose tries end at different steps and still get no farther is given up after MAX_TRIES.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain.elastic.records import TrainingError, WorkerDeath

MAX_TRIES_PER_STEP = 3
MAX_TRIES = 10
RETRY_DELAYS = (2.0, 30.0)  # seconds: before the second try, doubled for each further one; and the longest


@dataclass(frozen=True)
class TriesWithoutProgress:
    """How often the run was tried since it last made progress.

    Attributes:
        count: of tries.
        count_at_step: of these, how many ended at the same step as the last one.
        text: what the last one ended by.
    """

    count: int
    count_at_step: int
    text: str

    @property
    def should_give_up(self) -> bool:
        """Whether the run is to end."""
        return self.count_at_step >= MAX_TRIES_PER_STEP or self.count >= MAX_TRIES

    def next_try_delay(self) -> float:
        """Return the seconds to wait before the next try."""
        return 0.0 if self.count <= 1 else min(RETRY_DELAYS[0] * 2.0 ** (self.count - 2), RETRY_DELAYS[1])


def count_tries(
    deaths: Mapping[str, WorkerDeath], errors: Mapping[str, TrainingError], began: Mapping[str, int]
) -> TriesWithoutProgress:
    """Count the tries without progress.

    Args:
        deaths: by member.
        errors: of the recipe, by `GENERATION-MEMBER`.
        began: by generation, the steps that were done when it began.
    """
    ends: dict[int, list[tuple[int, str]]] = {}  # by generation: steps done, and what it ended by
    for death in deaths.values():
        text = f"a worker on {death.host} {death.cause} while it was {death.what}"
        ends.setdefault(death.generation, []).append((death.steps, text))
    for key, error in errors.items():
        ends.setdefault(int(key.partition("-")[0]), []).append((error.step, error.text))
    farthest = farthest_began = -1
    count = at_step = last = 0
    text = ""
    for generation in sorted({*ends, *map(int, began)}):
        start = began.get(str(generation), -1)
        steps = max([start, *(done for done, _ in ends.get(generation, []))])
        if steps > farthest or start > farthest_began:
            count = at_step = 0
        farthest, farthest_began = max(farthest, steps), max(farthest_began, start)
        if generation in ends:
            count, at_step, last = count + 1, at_step + 1 if steps == last or not at_step else 1, steps
            why = ends[generation][-1][1]
            tries = f"{count} tries" if count > 1 else "the first try"
            text = f"step {steps + 1} was not passed in {tries}; in the last one, {why}"
    return TriesWithoutProgress(count, at_step, text)


def describe_exit_code(code: int) -> str:
    """Return in words how a process ended, by its return code as subprocess gives it."""
    if code >= 0:
        return f"ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    hint = "; probably by the out-of-memory killer" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}{hint})"
