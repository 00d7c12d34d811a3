"""Low-rank factors, one of the two a step.

PowerSGD (Vogels et al., 1905.13727) sends both factors of X ~ P Q' one after the other. Sending them in turns
(ACP-SGD, Zhang et al., 2306.08881) takes one all-reduce a step, which overlaps with the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdtrain.compression.arguments import PositiveInteger
from hvdtrain.compression.codec import (
    BucketContext,
    Collective,
    FusedCodec,
    RandomKey,
    StatefulCodec,
    decode_by_adding,
)
from hvdtrain.compression.registry import compressor

# Values in a block of rows that is read several times while it is in a core's cache.
BLOCK_VALUES = 1 << 18


@compressor(
    "powersgd",
    argument=PositiveInteger("rank", "rank of the factors", default=4),
    dense_steps=100,
    auto_candidate=True,
)
class PowerSgd(StatefulCodec, FusedCodec):
    """Send the matrices of a bucket as products of rank `rank`; the last step's factor is the basis of the next.

    With X (n, m) a matrix of the gradients plus the residual, all ranks' sum in brackets:

        step k      P = X Q,  [P] is sent;    decoded [P] Q';    the next basis P* = orth([P])       (`sends_left`)
        step k + 1  Q = X' P*, [Q] is sent;   decoded P* [Q]';   the next basis Q* = orth([Q])

    The basis is the same on all ranks: it is made of what the all-reduce gave.
    """

    collective = Collective.ALL_REDUCE

    def __init__(self, rank: int, shapes: Sequence[tuple[int, int]], key: RandomKey, device: torch.device) -> None:
        """Draw the first bases, orthonormal, the same on all ranks.

        Args:
            rank: r, of the factors; less for matrices with fewer rows or columns.
            shapes: (n, m) of each matrix, in the order in which they lie in the flat tensor.
            key: what the bases are drawn by.
            device: where the flat tensor is.
        """
        self.shapes = list(shapes)
        self.device = device
        self.matrix_ranks = [min(rank, n, m) for n, m in shapes]
        self.sends_left = True  # whether this step sends P (n, r), on the basis Q (m, r); else Q, on the basis P
        generator = key.make_generator(device, shared=True)
        drawn = [
            torch.randn(m, r, generator=generator, device=device)
            for (_, m), r in zip(shapes, self.matrix_ranks, strict=True)
        ]
        self.bases = [orthonormal_basis(factor) for factor in drawn]
        self._fused_factors: dict[int, Tensor] = {}

    @classmethod
    def for_bucket(cls, context: BucketContext) -> PowerSgd:
        return cls(context.argument, context.shapes, context.key, context.device)

    def split_matrices(self, x: Tensor) -> list[Tensor]:
        """Return x, (sum of n m,), as the matrices (n, m) in it."""
        parts = torch.split(x, [n * m for n, m in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def orient_matrices(self, x: Tensor) -> list[Tensor]:
        """Return the matrices as the basis' transpose is multiplied with them: X' for the basis Q, X for P."""
        return [matrix.T if self.sends_left else matrix for matrix in self.split_matrices(x)]

    def unpack_factors(self, payload: Tensor) -> list[Tensor]:
        """Return the payload as matrices (n, r) or (m, r), column by column: far faster to multiply than by rows."""
        rows = [(n if self.sends_left else m, r) for (n, m), r in zip(self.shapes, self.matrix_ranks, strict=True)]
        parts = torch.split(payload, [n * r for n, r in rows])
        return [part.view(r, n).T for part, (n, r) in zip(parts, rows, strict=True)]

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(n,) -> (sum of n r or m r,) float32"""
        sides = self.orient_matrices(x.float())
        return torch.cat([(basis.T @ side).flatten() for side, basis in zip(sides, self.bases, strict=True)])

    def encode_fused(self, index: int, total: Tensor, residual: Tensor, gradient: Tensor) -> None:
        # On a CPU block by block, so that total, residual and gradient, (n, m), come from memory once.
        basis = self.bases[index]
        if self.sends_left:
            parts = []
            for x, old, new in iterate_row_blocks(total, residual, gradient):
                torch.add(old, new, out=x)
                parts.append(basis.T @ x.T)
                x.T.addmm_(basis, parts[-1], alpha=-1)
            factor = torch.cat(parts, dim=1)
        else:
            factor = total.new_zeros(basis.shape[1], total.shape[1])
            for x, old, new, part in iterate_row_blocks(total, residual, gradient, basis):
                torch.add(old, new, out=x)
                factor.addmm_(part.T, x)
            total.addmm_(basis, factor, alpha=-1)
        self._fused_factors[index] = factor.flatten()

    def pop_fused_payload(self) -> Tensor:
        payload = torch.cat([self._fused_factors[index] for index in range(len(self.shapes))])
        self._fused_factors.clear()
        return payload

    def decode(self, payload: Tensor, n: int, key: RandomKey) -> Tensor:
        return decode_by_adding(self, payload, n, key)

    def add_decoded(
        self, total: Tensor, payload: Tensor, key: RandomKey, alpha: float = 1, fresh: bool = False
    ) -> None:
        for matrix, factor, basis in zip(
            self.split_matrices(total), self.unpack_factors(payload), self.bases, strict=True
        ):
            left, right = (factor, basis) if self.sends_left else (basis, factor)
            for block, part in iterate_row_blocks(matrix, left):
                block.addmm_(part, right.T, beta=0 if fresh else 1, alpha=alpha)

    def advance(self, total: Tensor) -> None:
        """Make what all ranks sent together the next step's basis."""
        self.bases = [orthonormal_basis(factor) for factor in self.unpack_factors(total)]
        self.sends_left = not self.sends_left

    def parameter_states(self) -> list[tuple[bool, Tensor]]:
        """Return `sends_left` and the basis of each matrix."""
        return [(self.sends_left, basis.clone()) for basis in self.bases]

    def load_parameter_states(self, states: Sequence[Any]) -> None:
        """Take over the bases of all matrices; none of them if one is missing, or of another rank or side."""
        left = states[0][0] if states[0] is not None else self.sends_left
        shapes = [(m if left else n, rank) for (n, m), rank in zip(self.shapes, self.matrix_ranks, strict=True)]
        bases = [basis for side, basis in filter(None, states) if side == left]
        if [tuple(basis.shape) for basis in bases] == shapes:
            self.sends_left = left
            self.bases = [basis.to(self.device) for basis in bases]


def iterate_row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of the rows of matrices (n, any), the same rows of each: on a GPU all rows at once."""
    rows = len(matrices[0]) if matrices[0].is_cuda else -(-BLOCK_VALUES // matrices[0].shape[1])
    return zip(*(torch.split(matrix, rows) for matrix in matrices), strict=True)


def orthonormal_basis(factor: Tensor) -> Tensor:
    """Return an orthonormal basis of at least the columns' span: (n, r) -> (n, r), column by column."""
    basis: Tensor = torch.linalg.qr(factor).Q
    return basis.T.contiguous().T
