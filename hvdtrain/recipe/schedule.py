"""Learning-rate schedules as text.

    constant                    the learning rate as it is
    cosine   cosine:0.1         half a cosine down to 0, or to that fraction of the learning rate, after the last step
    linear   linear:0.1         a straight line down to the same
    step:30ep,60ep x0.1         multiplied by 0.1 at epochs 30 and 60
    cosine restarts:10ep x2     half a cosine again and again, the first over 10 epochs, each twice as long as the last
                                (Loshchilov and Hutter, 1608.03983)
    plateau:3 x0.5              halved after each 3 evaluations without a better value of the recipe's `best`
    warmup:5ep SHAPE            from near 0 up over 5 epochs, then any of the above over the rest
    onecycle                    up from 1/25 over 30 % of the steps, down to 1/250,000 over the others, by half cosines
                                (Smith and Topin, 1708.07120; as torch's OneCycleLR, without its cycle of the momentum)
    invsqrt:4000                up over 4000 steps, then down as 1/sqrt(step) (Vaswani et al., 1706.03762)

A position is in epochs (`5ep`, `0.5ep`) or in steps (`500`). 1 is the recipe's learning rate, everywhere.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from hvdtrain.system.errors import UserError, suggest_nearest

SHAPES = ("constant", "cosine", "linear", "step", "plateau", "onecycle", "invsqrt", "warmup")
WHOLE_SHAPES = ("onecycle", "invsqrt")  # these have a warm-up of their own
SCHEDULE_EXAMPLE = "for example 'warmup:5ep cosine' or 'step:30ep,60ep x0.1'"
# torch's OneCycleLR: the part of the steps that go up, the first factor, and the last one's fraction of the first
ONECYCLE_RISE, ONECYCLE_START, ONECYCLE_END = 0.3, 1 / 25, 1e-4
Factor = Callable[[int], float]


@dataclass(frozen=True)
class Plateau:
    """How the learning rate falls: multiplied by `ratio` after each `evaluations` of them without improvement."""

    evaluations: int
    ratio: float


Shape = tuple[Factor, list[int], Plateau | None]  # the factor by steps, where its shape changes, and the plateau
CONSTANT: Shape = (lambda step: 1.0, [], None)


@dataclass(frozen=True)
class Schedule:
    """A parsed schedule: `factor(step)` multiplies the learning rate; at the steps `corners` its shape changes."""

    text: str
    factor: Factor
    corners: tuple[int, ...]
    plateau: Plateau | None = None  # what comes on top of `factor`, which evaluations decide

    def lr_factor(self, step: int, lr_drops: int) -> float:
        """Return what multiplies the learning rate at a step, after so many drops of the plateau."""
        return self.factor(step) * (self.plateau.ratio**lr_drops if self.plateau is not None else 1.0)


@dataclass(frozen=True)
class ScheduleParser:
    """Parses the text of a schedule for a run of `total_steps` steps."""

    text: str
    total_steps: int
    steps_per_epoch: int

    def parse(self) -> Schedule:
        """Return the schedule. Raises UserError."""
        words, warmup = self.text.split(), 0
        if words and words[0].partition(":")[0] == "warmup":
            warmup = self._parse_steps(self._parse_argument(words.pop(0), needed=True))
            words = words or ["constant"]
            if words[0].partition(":")[0] in WHOLE_SHAPES:
                raise self._refuse(f"{words[0].partition(':')[0]} has a warm-up of its own: leave out 'warmup'")
        if not words:
            raise UserError(f"the schedule is empty; {SCHEDULE_EXAMPLE}")
        decay, corners, plateau = self._parse_shape(words, warmup)

        def factor(step: int) -> float:
            return (step + 1) / (warmup + 1) * decay(step) if step < warmup else decay(step)

        shown = {0, warmup, *corners, self.total_steps - 1} & set(range(self.total_steps))
        return Schedule(self.text, factor, tuple(sorted(shown)), plateau)

    def _parse_shape(self, words: list[str], warmup: int) -> Shape:
        name = words[0].partition(":")[0]
        if name not in SHAPES[:-1]:
            raise self._refuse(f"no shape {name!r}{suggest_nearest(name, SHAPES)}")
        if name == "step":
            return self._parse_drops(words)
        if name == "plateau":
            return lambda step: 1.0, [], self._parse_plateau(words)
        if name == "cosine" and len(words) > 1 and words[1].partition(":")[0] == "restarts":
            return self._parse_restarts(words, warmup)
        if len(words) > 1:
            raise self._refuse(f"{words[1]!r} is unexpected; {SCHEDULE_EXAMPLE}")
        if name == "invsqrt":
            rise = self._parse_steps(self._parse_argument(words[0], needed=True))
            return lambda step: min((step + 1) / max(1, rise), math.sqrt(max(1, rise) / (step + 1))), [rise - 1], None
        if name in ("constant", "onecycle"):
            if ":" in words[0]:
                raise self._refuse(f"{name} takes no argument")
            top = round(ONECYCLE_RISE * self.total_steps) - 1
            return (one_cycle_factor(self.total_steps), [top], None) if name == "onecycle" else CONSTANT
        end, span = self._parse_fraction(self._parse_argument(words[0])), max(1, self.total_steps - warmup)

        def decay(step: int) -> float:
            done = min(1.0, max(0, step - warmup) / span)
            return end + (1 - end) * (half_cosine(done) if name == "cosine" else 1 - done)

        return decay, [], None

    def _parse_drops(self, words: list[str]) -> Shape:
        if len(words) != 2:
            raise self._refuse("step takes positions and a factor, 'step:30ep,60ep x0.1'")
        drops = [self._parse_steps(place) for place in self._parse_argument(words[0], needed=True).split(",")]
        ratio = self._parse_times(words[1], "'step:30ep,60ep x0.1'")
        return lambda step: ratio ** sum(step >= drop for drop in drops), drops, None

    def _parse_plateau(self, words: list[str]) -> Plateau:
        example = "'plateau:3 x0.5'"
        number = self._parse_argument(words[0])
        if len(words) != 2 or not re.fullmatch(r"[1-9]\d*", number):
            raise self._refuse(f"plateau takes a number of evaluations and a factor, {example}")
        ratio = self._parse_times(words[1], example)
        if not 0 < ratio < 1:
            raise self._refuse(f"{words[1]!r} does not lower the learning rate; expected a factor as in {example}")
        return Plateau(int(number), ratio)

    def _parse_restarts(self, words: list[str], warmup: int) -> Shape:
        example = "'cosine restarts:10ep x2'"
        end, length = self._parse_fraction(self._parse_argument(words[0])), words[1].partition(":")[2]
        if len(words) > 3 or not length:
            raise self._refuse(f"restarts takes the length of the first cosine and a factor, {example}")
        ratio = self._parse_times(words[2], example) if len(words) == 3 else 1.0
        first = self._parse_steps(length)
        if first < 1 or ratio < 1:
            raise self._refuse(f"{' '.join(words[1:])!r}: cosines become shorter, or have no step; expected {example}")
        starts = [warmup]
        for cycle in itertools.count():
            starts.append(starts[-1] + max(1, round(first * ratio**cycle)))
            if starts[-1] >= self.total_steps:
                break

        def decay(step: int) -> float:
            cycle = max(0, bisect.bisect_right(starts, step, hi=len(starts) - 1) - 1)
            done = (step - starts[cycle]) / (starts[cycle + 1] - starts[cycle])
            return end + (1 - end) * half_cosine(min(1.0, max(0.0, done)))

        return decay, starts[1:], None

    def _refuse(self, why: str) -> UserError:
        return UserError(f"schedule {self.text!r}: {why}")

    def _parse_argument(self, word: str, needed: bool = False) -> str:
        name, _, argument = word.partition(":")
        if needed and not argument:
            raise self._refuse(f"{name} needs a position, as in '{name}:5ep'")
        return argument

    def _parse_steps(self, word: str) -> int:
        return parse_position(word, self.steps_per_epoch, self._refuse)

    def _parse_fraction(self, word: str) -> float:
        try:
            value = float(word or "0")
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise self._refuse(f"{word!r} is not a fraction between 0 and 1")
        return value

    def _parse_times(self, word: str, example: str) -> float:
        """Return the factor `x0.1`."""
        if not re.fullmatch(r"x\d*\.?\d+", word):
            raise self._refuse(f"{word!r} is not a factor; expected {example}")
        return float(word[1:])


def parse_schedule(text: str, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Parse a schedule for a run of `total_steps` steps, counted from 0.

    Raises UserError naming the part that is wrong.
    """
    return ScheduleParser(text, total_steps, steps_per_epoch).parse()


def parse_position(word: str, steps_per_epoch: int, refuse: Callable[[str], UserError]) -> int:
    """Return `5ep` or `500` as a number of steps. refuse: makes the error of why it is neither."""
    match = re.fullmatch(r"(\d*\.?\d+)(ep)?", word)
    if not match or (not match[2] and "." in match[1]):
        raise refuse(f"{word!r} is not a position; give epochs ('5ep') or steps ('500')")
    return round(float(match[1]) * steps_per_epoch) if match[2] else int(match[1])


def half_cosine(done: float) -> float:
    """Return half a cosine from 1 at 0 down to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def one_cycle_factor(total_steps: int) -> Factor:
    """Return the factor of "onecycle" by steps."""
    top, last = ONECYCLE_RISE * total_steps - 1, total_steps - 1

    def factor(step: int) -> float:
        if step <= top and top > 0:
            return 1 + (ONECYCLE_START - 1) * half_cosine(step / top)
        lowest = ONECYCLE_START * ONECYCLE_END
        fallen = min(1.0, (step - max(0.0, top)) / max(1.0, last - max(0.0, top)))
        return lowest + (1 - lowest) * half_cosine(fallen)

    return factor


def parse_run_position(flag: str, text: str, total_steps: int, steps_per_epoch: int) -> int:
    """Return a place in a run, `25%` of it, `2ep` or `100st`, as a number of steps.

    Raises ValueError naming the option `flag`.
    """
    match = re.fullmatch(r"(\d*\.?\d+)(%|ep|st)", text)
    if match is None or (match[2] == "st" and "." in match[1]) or (match[2] == "%" and float(match[1]) > 100):
        raise ValueError(f"{flag} is {text!r}; expected a part of the run ('25%'), epochs ('2ep') or steps ('100st')")
    return round(float(match[1]) * {"%": total_steps / 100, "ep": steps_per_epoch, "st": 1}[match[2]])
