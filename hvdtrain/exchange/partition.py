"""Which part of each bucket belongs to which rank, if the optimizer's state is sharded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch

ShardUnit = Literal["elements", "parameters"]
NamedParameters = list[tuple[str, torch.nn.Parameter]]


def assign_mirrors(hosts: Sequence[str]) -> list[int]:
    """Return whose part each rank mirrors: another rank's, each once; on as many ranks as possible on another host.

    Ranks are sorted by host, those of the largest first, and each mirrors the one that is as far behind it as the
    largest host has ranks; on one host, the next one.

    hosts: of the ranks, two at least.
    """
    counts = Counter(hosts)
    in_line = sorted(range(len(hosts)), key=lambda rank: (-counts[hosts[rank]], hosts.index(hosts[rank]), rank))
    distance = max(counts.values()) if len(counts) > 1 else 1
    mirrored = dict(zip(in_line, in_line[distance:] + in_line[:distance], strict=True))
    return [mirrored[rank] for rank in range(len(hosts))]


@dataclass(eq=False)
class Partition:
    """How buckets are cut into one part a rank.

        elements      [ w1 w1 | w1 b1 ]    equal parts, the first ones larger by one value if it does not come out even
        parameters    [ w1 b2 | w2 b1 ]    whole parameters, each with the rank that has least so far, largest first

    The parameters of a bucket are sorted by their owners, so that a part is contiguous.

    Attributes:
        size: the number of ranks.
        unit: what is not cut.
        mirrors: of each rank, whose part it has as well (`assign_mirrors`); empty: each has its own only.
        owners: with whole parameters: each one's rank.
        loads: with whole parameters: how many values each rank has.
    """

    size: int
    unit: ShardUnit
    mirrors: Sequence[int] = ()
    owners: dict[torch.nn.Parameter, int] = field(default_factory=dict)
    loads: list[int] = field(default_factory=list)

    def assign_owners(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Give each of these parameters that has no owner one, on all ranks alike."""
        self.loads = self.loads or [0] * self.size
        for p in sorted((p for p in params if p not in self.owners), key=torch.Tensor.numel, reverse=True):
            self.owners[p] = self.loads.index(min(self.loads))
            self.loads[self.owners[p]] += p.numel()

    def cut_bucket(self, members: NamedParameters, widths: Sequence[int]) -> tuple[NamedParameters, list[int]]:
        """Return a bucket's parameters in the order in which they are to be in it, and the bounds of the ranks' parts.

        Args:
            members: names and parameters of one type.
            widths: how many real numbers each one holds.

        Returns:
            The bounds are (ranks + 1,), in real numbers.
        """
        if self.unit == "elements":
            together = 2 if members[0][1].is_complex() else 1
            whole, rest = divmod(sum(widths) // together, self.size)
            lengths = [(whole + (rank < rest)) * together for rank in range(self.size)]
            return members, [0, *accumulate(lengths)]
        self.assign_owners(p for _, p in members)
        lengths = [0] * self.size
        for (_, p), width in zip(members, widths, strict=True):
            lengths[self.owners[p]] += width
        return sorted(members, key=lambda member: self.owners[member[1]]), [0, *accumulate(lengths)]
