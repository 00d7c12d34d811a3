"""Learning-rate schedules as text.

    constant                    the learning rate as it is
    cosine   cosine:0.1         half a cosine down to 0, or to that fraction of the learning rate, after the last step
    linear   linear:0.1         a straight line down to the same
    step:30ep,60ep x0.1         multiplied by 0.1 at epochs 30 and 60
    warmup:5ep SHAPE            from near 0 up over 5 epochs, then any of the above over the rest

A position is in epochs (`5ep`, `0.5ep`) or in steps (`500`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from hvdtrain.system.errors import UserError, suggest_nearest

SHAPES = ("constant", "cosine", "linear", "step", "warmup")
SCHEDULE_EXAMPLE = "for example 'warmup:5ep cosine' or 'step:30ep,60ep x0.1'"


@dataclass(frozen=True)
class Schedule:
    """A parsed schedule: `factor(step)` multiplies the learning rate; at the steps `corners` its shape changes."""

    text: str
    factor: Callable[[int], float]
    corners: tuple[int, ...]


def parse_schedule(text: str, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Parse a schedule for a run of `total_steps` steps, counted from 0.

    Raises UserError naming the part that is wrong.
    """
    words = text.split()
    warmup = 0
    if words and words[0].startswith("warmup"):
        warmup = _parse_steps(_parse_argument(words.pop(0), text, needed=True), steps_per_epoch, text)
        words = words or ["constant"]
    if not words:
        raise UserError(f"the schedule is empty; {SCHEDULE_EXAMPLE}")
    name = words[0].partition(":")[0]
    if name not in SHAPES[:-1]:
        raise UserError(f"schedule {text!r}: no shape {name!r}{suggest_nearest(name, SHAPES)}")
    decay: Callable[[int], float]
    drops: list[int] = []
    if name == "step":
        if len(words) != 2 or not re.fullmatch(r"x\d*\.?\d+", words[1]):
            raise UserError(f"schedule {text!r}: step takes positions and a factor, 'step:30ep,60ep x0.1'")
        drops = [
            _parse_steps(p, steps_per_epoch, text) for p in _parse_argument(words[0], text, needed=True).split(",")
        ]
        ratio = float(words[1][1:])

        def decay(step: int) -> float:
            return ratio ** sum(step >= drop for drop in drops)

    elif len(words) > 1:
        raise UserError(f"schedule {text!r}: {words[1]!r} is unexpected; {SCHEDULE_EXAMPLE}")
    elif name == "constant":
        if ":" in words[0]:
            raise UserError(f"schedule {text!r}: constant takes no argument")

        def decay(step: int) -> float:
            return 1.0

    else:
        end = _parse_fraction(_parse_argument(words[0], text), text)
        span = max(1, total_steps - warmup)

        def decay(step: int) -> float:
            done = min(1.0, max(0, step - warmup) / span)
            shape = 0.5 * (1 + math.cos(math.pi * done)) if name == "cosine" else 1 - done
            return end + (1 - end) * shape

    def lr_factor(step: int) -> float:
        return (step + 1) / (warmup + 1) * decay(step) if step < warmup else decay(step)

    corners = sorted({0, warmup, *drops, total_steps - 1} & set(range(total_steps)))
    return Schedule(text, lr_factor, tuple(corners))


def _parse_argument(word: str, text: str, needed: bool = False) -> str:
    name, _, argument = word.partition(":")
    if name not in SHAPES:
        raise UserError(f"schedule {text!r}: no shape {name!r}{suggest_nearest(name, SHAPES)}")
    if needed and not argument:
        raise UserError(f"schedule {text!r}: {name} needs a position, as in '{name}:5ep'")
    return argument


def _parse_steps(word: str, steps_per_epoch: int, text: str) -> int:
    """Return `5ep` or `500` as a number of steps."""
    match = re.fullmatch(r"(\d*\.?\d+)(ep)?", word)
    if not match or (not match[2] and "." in match[1]):
        raise UserError(f"schedule {text!r}: {word!r} is not a position; give epochs ('5ep') or steps ('500')")
    return round(float(match[1]) * steps_per_epoch) if match[2] else int(match[1])


def _parse_fraction(word: str, text: str) -> float:
    if not word:
        return 0.0
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UserError(f"schedule {text!r}: {word!r} is not a fraction between 0 and 1")
    return value
