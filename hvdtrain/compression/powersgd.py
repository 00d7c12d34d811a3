"""Low-rank factors, one of the two a step.

PowerSGD (Vogels et al., 1905.13727) sends both factors of X ~ P Q' one after the other. Sending them in turns
(ACP-SGD, Zhang et al., 2306.08881) takes one all-reduce a step, which overlaps with the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, RandomKey, decode_by_adding

# Values of a block of rows that is gone through several times while it lies in a core's cache.
BLOCK_VALUES = 1 << 18


class PowerSgd:
    """Matrices of a bucket as products of rank `rank`, with the last step's factor as the basis of the next.

    shapes: (n, m) of each matrix, in the order in which they lie in the flat tensor. The basis is the same on all
    ranks: it is made from what the all-reduce gave.
    """

    collective: Collective = "sum"
    feedback = True
    block_size = 1

    def __init__(self, rank: int, shapes: list[tuple[int, int]], key: RandomKey, device: torch.device) -> None:
        self.shapes = shapes
        self.matrix_ranks = [min(rank, n, m) for n, m in shapes]
        self.sends_left = True  # whether this step sends P (n, r), on the basis Q (m, r); else Q, on the basis P
        generator = key.make_generator(device, shared=True)
        drawn = [
            torch.randn(m, r, generator=generator, device=device)
            for (_, m), r in zip(shapes, self.matrix_ranks, strict=True)
        ]
        self.bases = [orthonormal_basis(factor) for factor in drawn]
        self._fused_factors: dict[int, Tensor] = {}

    def split_matrices(self, x: Tensor) -> list[Tensor]:
        parts = torch.split(x, [n * m for n, m in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def orient_matrices(self, x: Tensor) -> list[Tensor]:
        """The matrices as the basis' transpose is multiplied with them: X' on the basis Q, X on the basis P."""
        return [matrix.T if self.sends_left else matrix for matrix in self.split_matrices(x)]

    def unpack_factors(self, payload: Tensor) -> list[Tensor]:
        """The payload as matrices (n, r) or (m, r), column by column: many times faster to multiply than by rows."""
        rows = [(n if self.sends_left else m, r) for (n, m), r in zip(self.shapes, self.matrix_ranks, strict=True)]
        parts = torch.split(payload, [n * r for n, r in rows])
        return [part.view(r, n).T for part, (n, r) in zip(parts, rows, strict=True)]

    def encode(self, x: Tensor, key: RandomKey) -> Tensor:
        """(n,) -> (sum of n r or m r,) float32"""
        sides = self.orient_matrices(x.float())
        return torch.cat([(basis.T @ side).flatten() for side, basis in zip(sides, self.bases, strict=True)])

    def encode_fused(self, number: int, total: Tensor, residual: Tensor, gradient: Tensor) -> None:
        """Set one matrix' total to residual + gradient less what of it is sent, and keep that for `taken`.

        All are (n, m), total and residual float32. On a CPU block by block, so that they come from memory once.
        """
        basis = self.bases[number]
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
        self._fused_factors[number] = factor.flatten()

    def pop_fused_payload(self) -> Tensor:
        """What `take` took of all matrices: as `encode` has it."""
        payload = torch.cat([self._fused_factors[number] for number in range(len(self.shapes))])
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

    def update_bases(self, total: Tensor) -> None:
        """Take what all ranks sent together as the next step's basis."""
        self.bases = [orthonormal_basis(factor) for factor in self.unpack_factors(total)]
        self.sends_left = not self.sends_left


def iterate_row_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each matrix (n, any) after the other: on a CPU blocks of the first one's size, on a GPU all."""
    rows = len(matrices[0]) if matrices[0].is_cuda else -(-BLOCK_VALUES // matrices[0].shape[1])
    return zip(*(torch.split(matrix, rows) for matrix in matrices), strict=True)


def orthonormal_basis(factor: Tensor) -> Tensor:
    """An orthonormal basis of at least the columns' span: (n, r) -> (n, r), column by column."""
    basis: Tensor = torch.linalg.qr(factor).Q
    return basis.T.contiguous().T
