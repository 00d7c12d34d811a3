"""Words in messages that depend on a number."""

from __future__ import annotations

from collections.abc import Sequence


def format_count(count: int, noun: str) -> str:
    """Return `1 rank` or `2 ranks`, for a noun whose plural ends in s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def join_alternatives(texts: Sequence[str]) -> str:
    """Return `a, b or c`."""
    return " or ".join([*([", ".join(texts[:-1])] if texts[1:] else []), *texts[-1:]])
