"""Each rank's share of the global batch, `--shares`: whole 1,024ths, one number a rank in rank order.

even        parts that differ by one example at most, as `hvdtrain.recipe.order.part_bounds` cuts them
3:1:1       as given, rounded to 1,024ths by largest remainder: 614:205:205
measured    even until the ranks' speeds are known, then by them: hvdtrain.training.balance
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from hvdtrain.recipe.order import WHOLE_SHARE, apportion, is_even
from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count

Shares: TypeAlias = tuple[int, ...]  # by rank, in 1,024ths; they add up to 1,024

EVEN, MEASURED = "even", "measured"
MAX_RANKS_SHOWN = 8


def make_shares(weights: Sequence[float], least: int = 1) -> Shares:
    """Return shares in proportion to weights.

    Args:
        weights: positive, one a rank.
        least: 1,024ths that each rank gets at least, up to an equal share.
    """
    parts = apportion(WHOLE_SHARE, weights)
    least = min(least, WHOLE_SHARE // len(parts))
    for rank in range(len(parts)):
        while parts[rank] < least:
            parts[parts.index(max(parts))] -= 1
            parts[rank] += 1
    return tuple(parts)


def even_shares(ranks: int) -> Shares:
    """Return equal shares."""
    return make_shares([1] * ranks, 0)


def parse_weights(text: str) -> list[float] | None:
    """Return the weights of a value of --shares such as `3:1:1`; None for one that names no numbers.

    Raises UserError for anything else.
    """
    if text in (EVEN, MEASURED):
        return None
    try:
        weights = [float(part) for part in text.split(":")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"--shares is {text!r}; expected even, measured, or a number above 0 for each rank in rank order, as 3:1:1"
        )
    return weights


def choose_shares(option: str, ranks: int, saved: str = "") -> Shares:
    """Return the shares that a world begins with.

    Args:
        option: of --shares.
        ranks: in the world.
        saved: the shares of the checkpoint that is resumed from; "": even. Measured ones are used again on as many
            ranks.

    Raises:
        UserError: they were given for another number of ranks, or there are more ranks than 1,024ths.
    """
    weights = parse_weights(option)
    if option != EVEN and ranks > WHOLE_SHARE:
        raise UserError(f"--shares {option} divides the batch into {WHOLE_SHARE} parts, and there are {ranks} ranks")
    if weights is None:
        shares = parse_shares(saved) if option == MEASURED and saved else ()
        return shares if len(shares) == ranks else even_shares(ranks)
    if len(weights) != ranks:
        raise UserError(
            f"--shares {option} has {format_count(len(weights), 'number')}, and there are {format_count(ranks, 'rank')}"
            ": give one for each rank, in rank order, or --shares measured"
        )
    return make_shares(weights)


def format_shares(shares: Shares) -> str:
    """Return shares as `683:341`, to be stored; "" if they are even."""
    return "" if is_even(shares) else ":".join(map(str, shares))


def parse_shares(text: str) -> Shares:
    """Return stored shares that are not even. Raises UserError for anything that is not such a text."""
    parts = text.split(":")
    shares = tuple(int(part) for part in parts if part.isascii() and part.isdecimal())
    if len(shares) != len(parts) or sum(shares) != WHOLE_SHARE:
        raise UserError(f"{text!r} are not shares of a batch; expected 1,024ths that add up to 1, as 683:341")
    return shares


def describe_shares(shares: Sequence[int]) -> str:
    """Return shares in a few words to print, of many ranks the first ones."""
    if is_even(shares):
        return EVEN
    shown = ":".join(map(str, shares[:MAX_RANKS_SHOWN])) + ":..." * (len(shares) > MAX_RANKS_SHOWN)
    return f"{shown} of {WHOLE_SHARE:,} by rank"
