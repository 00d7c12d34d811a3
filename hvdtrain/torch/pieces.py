"""Parameters that are gathered together, and the piece of each that a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.compression.scatter_reducer import PartOwner
from hvdtrain.exchange.buckets import Bucket, is_dense, make_views, real_numel, view_like
from hvdtrain.exchange.partition import Partition


@dataclass(frozen=True)
class Piece:
    """What a rank has of a parameter.

    Attributes:
        param: the parameter.
        start, end: which of its values, in the order of its memory.
        whole: whether it has the parameter's shape; else it is flat.
    """

    param: nn.Parameter
    start: int
    end: int
    whole: bool

    @property
    def num_reals(self) -> int:
        """How many real numbers it holds: two for each complex one."""
        return (self.end - self.start) * (2 if self.param.is_complex() else 1)

    def view_parameter(self) -> Tensor:
        """Return the piece of the parameter itself, without a copy."""
        p = self.param.detach()
        return p if self.whole else p.as_strided((p.numel(),), (1,))[self.start : self.end]

    def view_in(self, flat: Tensor) -> Tensor:
        """Return the piece's values of real numbers that begin with it, as it is shaped, without a copy."""
        if self.whole:
            return make_views(flat, [self.param])[0]
        values = flat[: self.num_reals]
        return torch.view_as_complex(values.view(-1, 2)) if self.param.is_complex() else values


HeldPiece = tuple[Piece, nn.Parameter]  # with what the optimizer has of it


class ShardedBucket:
    """Parameters of one type that are gathered together, and which part of them is whose.

    Attributes:
        params: in the order in which they follow each other.
        bounds: (ranks + 1,) of the ranks' parts, in real numbers.
        dtype: of these.
        source: the bucket of their gradients; None if they are whole on every rank.
        is_used: whether any rank has used one of the parameters in the last step.
        own: this rank's pieces, each with the parameter that the optimizer has of it, in the order of its part.
        mirrored: the same of the part that this rank mirrors; empty if it mirrors none.
    """

    def __init__(self, params: list[nn.Parameter], bounds: Sequence[int], partition: Partition, rank: int) -> None:
        self.params, self.bounds, self.partition, self.rank = params, tuple(bounds), partition, rank
        self.dtype, self.device = params[0].dtype.to_real(), params[0].device
        self.source: Bucket | None = None
        self.is_used = False
        for p in params:
            if not is_dense(p):
                p.data = p.detach().clone(memory_format=torch.contiguous_format)
        held = [[(piece, nn.Parameter(piece.view_parameter())) for piece in pieces] for pieces in self.list_held(rank)]
        self.own, self.mirrored = held[0], [pair for pairs in held[1:] for pair in pairs]

    @property
    def held(self) -> list[HeldPiece]:
        """This rank's pieces, and those that it mirrors."""
        return [*self.own, *self.mirrored]

    def count_own_bytes(self) -> int:
        """Return the bytes of this rank's part."""
        return (self.bounds[self.rank + 1] - self.bounds[self.rank]) * self.dtype.itemsize

    def start_gathering(self, name: str, values: Sequence[Tensor]) -> collectives.Handle:
        """Start bringing every rank what the others have; values: of this rank's pieces, in order."""
        own = [view_real(value.detach()) for value in values]
        part = torch.cat(own) if own else torch.empty(0, dtype=self.dtype, device=self.device)
        return collectives.all_gather_async(part.view(torch.uint8), name)

    def cut_gathered(self, handle: collectives.Handle) -> list[tuple[nn.Parameter, Tensor]]:
        """Wait for all parts; return each parameter with what was gathered of it, in its shape."""
        gathered = collectives.wait(handle).view(self.dtype)
        return list(zip(self.params, make_views(gathered, self.params), strict=True))

    def list_held(self, rank: int) -> list[list[Piece]]:
        """Return the pieces of a rank's own part and, if parts are mirrored, of the one that it mirrors."""
        parts = [rank, *self.partition.mirrors[rank : rank + 1]]
        return [self.list_pieces(part) for part in parts]

    def list_pieces(self, rank: int) -> list[Piece]:
        """Return a rank's pieces, in the order in which they lie."""
        begin, end, at, pieces = self.bounds[rank], self.bounds[rank + 1], 0, []
        for p in self.params:
            first, last = max(begin, at), min(end, at + real_numel(p))
            if first < last:
                width = 2 if p.is_complex() else 1
                whole = self.partition.unit == "parameters"
                pieces.append(Piece(p, (first - at) // width, (last - at) // width, whole))
            at += real_numel(p)
        return pieces

    def get_used(self) -> set[nn.Parameter]:
        """Return the parameters of which any rank had a gradient in the last step, if their sums are scattered."""
        assert self.source is not None
        return {p for p, ranks in zip(self.source.params, self.source.used, strict=False) if ranks}

    def take_gradients(self) -> bool:
        """Give this rank's pieces their gradients; return whether any rank has used a parameter."""
        if self.source is not None:
            reducer, used = self.source.reducer, self.get_used()
            assert isinstance(reducer, PartOwner)
            for held, part in ((self.own, reducer.part), (self.mirrored, reducer.mirrored_part)):
                for (piece, own), gradient in zip(held, cut_part(held, part), strict=True):
                    own.grad = gradient.to(own.dtype) if piece.param in used else None
            return bool(used)
        for piece, own in self.held:
            whole = piece.param.grad
            own.grad = None
            if whole is not None:
                own.grad = cut_piece(piece, whole.to_dense() if whole.is_sparse else whole)
        return any(p.grad is not None for p in self.params)


def cut_part(held: Sequence[HeldPiece], part: Tensor) -> list[Tensor]:
    """Return the pieces of a tensor that is laid out as the part that they are of."""
    found, at = [], 0
    for piece, _ in held:
        found.append(piece.view_in(part[at:]))
        at += piece.num_reals
    return found


def flatten_like(value: Tensor, p: Tensor) -> Tensor:
    """Return (values,) of a tensor that has a parameter's shape, in the order of the parameter's memory."""
    flat = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
    view_like(flat, p).copy_(value)
    return flat


def view_real(value: Tensor) -> Tensor:
    """Return (values,) real numbers of a dense tensor, in the order of its memory, without a copy."""
    flat = value.as_strided((value.numel(),), (1,))
    return torch.view_as_real(flat).view(-1) if value.is_complex() else flat


def cut_piece(piece: Piece, value: Tensor) -> Tensor:
    """Return a piece of a tensor that has the parameter's shape, a copy unless it is whole."""
    return value if piece.whole else flatten_like(value, piece.param)[piece.start : piece.end]


def cut_state(piece: Piece, value: Any) -> Any:
    """Return what a piece's state has of what a parameter's has: its part of a tensor of that shape, else all."""
    if not isinstance(value, Tensor) or value.shape != piece.param.shape or piece.whole:
        return value.clone() if isinstance(value, Tensor) else value
    return cut_piece(piece, value).clone()
