"""`--shares measured`: shares of the batch by the measured speed of each rank.

    each step        each rank notes how many examples it had, and how long it computed without waiting for others
    when it is due   by rank 0's clock, which votes for it (`StepVotes.compares_speeds`), so that all ranks know
    after that step  all gather what an example takes on each rank, in one collective, and find the same shares
    if they pay      the loop ends, and begins again at this position with a plan of these shares: dealing.py

With t_r, the seconds that an example takes on rank r, and n_r, its examples, a step computes for max_r t_r n_r seconds,
least if n_r is in proportion to 1 / t_r. What a step costs a rank whatever its examples is in t_r as well, so that a
change may be too small, never too large; the next measurement finds the rest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.diagnosis.straggler import GROUP_SECONDS
from hvdtrain.recipe.order import WHOLE_SHARE
from hvdtrain.recipe.shares import MEASURED, Shares, make_shares
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import TrainingPlan

MEASURED_STEPS = 20  # whose times are compared, at least
MEASURED_SECONDS = 2.0  # that they last, at least: many times the period of a quota of CPU time
COMPARISON_INTERVAL = 60.0  # seconds from one comparison to the next
MIN_GAIN = 0.05  # of a step: what other shares must save


@dataclass(frozen=True)
class NewShares:
    """Shares that are better than the present ones."""

    shares: Shares
    gain: float  # of a step, predicted
    example_seconds: Sequence[float]  # by rank


class SpeedComparison:
    """Measures how fast each rank of a world computes, and finds the shares that fit."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._compared_at = -math.inf
        self._steps: deque[tuple[int, float, float]] = deque()  # examples, seconds computed, seconds in all
        self._seconds = 0.0  # in all of them
        self._is_first_step = True  # in which kernels are chosen, and functions compiled

    def forget_steps(self) -> None:
        """Forget the steps so far: those to come have other shares."""
        self._steps.clear()
        self._seconds, self._is_first_step = 0.0, True

    def record_step(self, examples: int, computed: float, seconds: float) -> None:
        """Note a step of this rank.

        Args:
            examples: that it had.
            computed: seconds that it took without waiting for other ranks.
            seconds: that the step took.
        """
        if self._is_first_step:
            self._is_first_step = False
            return
        self._steps.append((examples, computed, seconds))
        self._seconds += seconds
        while len(self._steps) > MEASURED_STEPS and self._seconds - self._steps[0][2] >= MEASURED_SECONDS:
            self._seconds -= self._steps.popleft()[2]

    def is_due(self) -> bool:
        """Whether the ranks are to compare their speeds after the present step, by this rank's clock."""
        if len(self._steps) < MEASURED_STEPS or self._seconds < MEASURED_SECONDS:
            return False
        return self._clock() - self._compared_at >= COMPARISON_INTERVAL

    def measure_example(self) -> float:
        """Return the seconds that an example takes on this rank, the median of groups of steps; NaN without any.

        A core that is throttled stands still in some of many short steps: they are compared in groups.
        """
        steps = list(self._steps)
        if not steps:
            return math.nan
        mean = statistics.fmean(seconds for _, _, seconds in steps)
        count = max(1, min(math.ceil(GROUP_SECONDS / max(mean, 1e-6)), len(steps) // 4))
        groups = [steps[-i - count : len(steps) - i] for i in range(0, len(steps) - count + 1, count)]
        sums = [(sum(one[0] for one in group), sum(one[1] for one in group)) for group in groups]
        return statistics.median([computed / examples for examples, computed in sums if examples] or [math.nan])

    def find_shares(self, plan: TrainingPlan, options: RunOptions) -> NewShares | None:
        """Compare the ranks' speeds on all ranks; return the same better shares on all, or None."""
        self._compared_at = self._clock()
        step = statistics.median([seconds for _, _, seconds in self._steps] or [0.0])
        everyone = collectives.gather_array(np.array([self.measure_example(), step]), "shares.speeds")
        return find_better_shares(plan, options, everyone[:, 0].tolist(), float(everyone[:, 1].max()))


def find_better_shares(
    plan: TrainingPlan, options: RunOptions, example_seconds: Sequence[float], step_seconds: float
) -> NewShares | None:
    """Return shares that save at least MIN_GAIN of a step, if there are any.

    Args:
        plan: with the present shares.
        options: of the run.
        example_seconds: by rank, what an example takes; NaN: it had none.
        step_seconds: what a step takes.
    """
    if not all(seconds > 0 for seconds in example_seconds):
        return None
    # At least one example, or shard, of a whole batch for each rank: else its speed could not be measured again.
    units = plan.shards if plan.deterministic else plan.batch_size
    shares = make_shares([1 / seconds for seconds in example_seconds], -(-WHOLE_SHARE // units))

    def predict_seconds(dealt: Sequence[int]) -> float:
        return max(count * seconds for count, seconds in zip(dealt, example_seconds, strict=True))

    now, then = (predict_seconds(one.count_dealt()) for one in (plan, plan.deal_by(shares, options)))
    gain = (now - then) / max(step_seconds, now)
    return NewShares(shares, gain, example_seconds) if gain > MIN_GAIN else None


def make_speed_comparison(options: RunOptions, ranks: int) -> SpeedComparison | None:
    """Return the comparison of speeds in a world of this many ranks; None unless --shares is measured."""
    return SpeedComparison() if options.data.shares == MEASURED and ranks > 1 else None
