"""Words in messages that depend on a number."""

from __future__ import annotations


def format_count(count: int, noun: str) -> str:
    """Return `1 rank` or `2 ranks`, for a noun whose plural ends in s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
