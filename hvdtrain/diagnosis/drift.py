"""Find replicas that differ from the others, by the checksums of all ranks' tensors. No collectives."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Drift:
    """Replicas that are not the same."""

    first_tensor: str  # the first that differs, in the model's order
    ranks: list[int]  # whose tensor differs from the majority's; all ranks if there is no majority
    has_majority: bool
    num_differing: int  # how many differ


def hash_checksums(checksums: Mapping[str, int]) -> int:
    """Return a signed 64-bit hash of all names and checksums."""
    seen = hashlib.blake2b(repr(list(checksums.items())).encode(), digest_size=8)
    return int.from_bytes(seen.digest(), "little", signed=True)


def find_drift(checksums: Sequence[Mapping[str, int]], columns: Sequence[Sequence[int]] | None = None) -> Drift | None:
    """Return what differs between the replicas, or None: in the first column in which anything does.

    A tensor that only some ranks of a column have differs.
    Of two ranks, and if no more than half agree, it is unknown which is right.

    Args:
        checksums: of each rank, by name.
        columns: the ranks that hold the same part of the model; None: all hold all of it.
    """
    for column in columns or [range(len(checksums))]:
        own = [checksums[rank] for rank in column]
        names = dict.fromkeys(name for of_rank in own for name in of_rank)
        differing = [name for name in names if len({of_rank.get(name) for of_rank in own}) > 1]
        if differing:
            values = [of_rank.get(differing[0]) for of_rank in own]
            ((most, count),) = Counter(values).most_common(1)
            majority = 2 * count > len(values)
            ranks = [rank for rank, value in zip(column, values, strict=True) if not majority or value != most]
            return Drift(differing[0], ranks, majority, len(differing))
    return None
