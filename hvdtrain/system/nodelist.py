"""Parse Slurm's short forms: `n[0-3,7],gpu[001-010]` for names of nodes, `2(x3),1` for a number for each."""

from __future__ import annotations

import re
from itertools import product

from hvdtrain.system.errors import UserError

MAX_NODES = 100_000  # a longer list is rejected
NAME_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
# Commas between brackets belong to the name.
ITEM_PATTERN = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
PART_PATTERN = re.compile(r"\[([^\]]*)\]|([^\[]+)")


def parse_node_list(text: str, where: str) -> list[str]:
    """Return the names in a list of nodes, in its order, with leading zeros as written.

    Args:
        text: the list.
        where: what holds it, for the error.

    Raises:
        UserError: it is not such a list.
    """
    found: list[str] = []
    if ",".join(ITEM_PATTERN.findall(text)) != text or not text:
        raise UserError(f"{where}={text!r} is not a list of nodes such as n[0-3,7],gpu01")
    for item in ITEM_PATTERN.findall(text):
        parts = [[plain] if plain else expand_ranges(ranges) for ranges, plain in PART_PATTERN.findall(item)]
        made = 1
        for part in parts:
            made *= len(part)
        if not 0 < made <= MAX_NODES - len(found):
            raise UserError(f"{where}={text!r} is not a list of nodes: {item!r}")
        found += ["".join(name) for name in product(*parts)]
    for name in found:
        if not NAME_PATTERN.fullmatch(name):
            raise UserError(f"{where}={text!r} is not a list of nodes: {name!r} is not a host name")
    return found


def expand_ranges(ranges: str) -> list[str]:
    """Return the numbers of `01-03,7`, as wide as the first of each range; none if the text is not of this form."""
    found = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item, re.ASCII)
        if not match:
            return []
        first, last = int(match[1]), int(match[2] or match[1])
        if not 0 <= last - first < MAX_NODES:
            return []
        found += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return found


def parse_repeated_counts(text: str, where: str) -> list[int]:
    """Return the numbers of `2(x3),1`: 2, 2, 2, 1. Raises UserError if the text is not of this form."""
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", item, re.ASCII)
        if not match:
            raise UserError(f"{where}={text!r} is invalid; expected numbers such as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found
