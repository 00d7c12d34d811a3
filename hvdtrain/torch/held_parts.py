"""What ranks have of a sharded optimizer's state, cut and joined as another number of ranks needs it.

held, rank 0   [ w w w w . . . . ]         intervals of parameters: own pieces, and mirrored ones
      rank 2   [ . . . . w w b b ]
needed         [ w w w | w w w | b b ]     of each, which interval comes from which rank: `find_sources`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvdtrain.comm.uneven import exchange_bytes
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.pieces import Piece
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.tensors import read_tensors, write_tensors
from hvdtrain.torch.update_undo import copy_state

AVERAGE = "hvdtrain.average"  # of --ema, next to what the optimizer keeps of a piece


class Interval(NamedTuple):
    """Which values of a parameter, in the order of its memory, a rank has."""

    rank: int
    start: int
    end: int


@dataclass
class HeldPart:
    """What this rank has of a parameter's state.

    Attributes:
        name: the parameter's.
        piece: which part of it.
        state: what the optimizer keeps of it.
        next_state: the same after the update that was begun and undone; None: none was.
        average: of --ema; None: there is none.
    """

    name: str
    piece: Piece
    state: StateDict
    next_state: StateDict | None
    average: Tensor | None

    @property
    def place(self) -> tuple[str, int, int]:
        """The parameter's name, and which of its values, for other ranks."""
        return self.name, self.piece.start, self.piece.end

    def contains(self, interval: Interval) -> bool:
        """Return whether it has these values of its parameter."""
        return self.piece.start <= interval.start and interval.end <= self.piece.end

    def cut_state(self, start: int, end: int) -> StateDict:
        """Return a copy of the state, and of the average, of some of the parameter's values."""
        cut = self.state if self.average is None else {**self.state, AVERAGE: self.average}
        length, begin = self.piece.end - self.piece.start, self.piece.start
        if not self.piece.whole:
            own = slice(start - begin, end - begin)
            cut = {key: value[own] if is_sized(value, length) else value for key, value in cut.items()}
        return copy_state(cut)


def is_sized(value: object, length: int) -> bool:
    """Return whether a state's value has a number for each of a piece's values."""
    return isinstance(value, Tensor) and value.shape == (length,)


def take_parts(shards: OptimizerShards, averages: Mapping[nn.Parameter, Tensor]) -> list[HeldPart]:
    """Return what this rank has: before an update that was begun, which must be undone, and after it."""
    parts = []
    for bucket in shards.buckets:
        for piece, values in bucket.held:
            state: StateDict = dict(shards.optimizer.state.get(values, {}))
            before, after = (state, None) if shards.undo is None else (shards.undo.states[values], state)
            parts.append(HeldPart(shards.names[piece.param], piece, before, after, averages.get(values)))
    return parts


Needs = Sequence[Sequence[tuple[object, Sequence[Interval]]]]  # of each rank: pieces, and where they come from


def find_sources(holders: Sequence[Interval], piece: Piece | Interval, rank: int) -> list[Interval] | None:
    """Return from which ranks a rank gets the values of a piece, in order; None if some are nowhere.

    It takes what it has itself; else ranks take from different holders.

    Args:
        holders: of the parameter's values.
        piece: what is needed.
        rank: by which rank.
    """
    found, at = [], piece.start
    while at < piece.end:
        there = [held for held in holders if held.start <= at < held.end]
        if not there:
            return None
        own = [held for held in there if held.rank == rank]
        chosen = own[0] if own else there[rank % len(there)]
        found.append(Interval(chosen.rank, at, min(chosen.end, piece.end)))
        at = found[-1].end
    return found


def join_parts(parts: Sequence[tuple[int, StateDict]]) -> StateDict:
    """Return the state of a piece from those of its parts, in order, each with its number of values."""
    if not parts:
        return {}
    length, first = parts[0]
    joined = dict(first)
    for key, value in first.items():
        if len(parts) > 1 and is_sized(value, length):
            joined[key] = torch.cat([state[key].to(value.device) for _, state in parts])
    return joined


def send_states(outgoing: Sequence[list[StateDict]], needs: Needs, name: str) -> list[list[StateDict]]:
    """Send each rank its list of states, and return those received, by rank; nothing travels if nobody needs any.

    needs: of each rank, the same on all ranks.
    """
    if all(i.rank == rank for rank, theirs in enumerate(needs) for _, sources in theirs for i in sources):
        return [[] for _ in outgoing]
    packed = [write_tensors(states) if states else b"" for states in outgoing]
    return [read_tensors(data) if data else [] for data in exchange_bytes(packed, name)]


def name_lost_ranks(last_parts: Sequence[tuple[int, list[int]]], what: str) -> str:
    """Return a clause about whose parts no rank has any more.

    Args:
        last_parts: of ranks that have some, the number of ranks in the world before, and whose parts they had there.
        what: the parts are of: "the optimizer's state".
    """
    size = max((size for size, _ in last_parts), default=0)
    lost = sorted(set(range(size)) - {part for _, parts in last_parts for part in parts})
    if not lost:
        return f"parts of {what} and their mirrors are gone"
    ranks = ", ".join(map(str, lost))
    whose = f"ranks {ranks} and their mirrors" if len(lost) > 1 else f"rank {ranks} and its mirror"
    return f"{what} of {whose} are gone"
