"""Low-rank factors, one of the two a step.

PowerSGD (Vogels et al., 1905.13727) sends both factors of X ~ P Q' one after the other. Sending them in turns
(ACP-SGD, Zhang et al., 2306.08881) takes one all-reduce a step, which overlaps with the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hvdtrain.compression.codec import Collective, Key, decode_by_adding

# Values of a block of rows that is gone through several times while it lies in a core's cache.
BLOCK = 1 << 18


class PowerSgd:
    """Matrices of a bucket as products of rank `rank`, with the last step's factor as the basis of the next.

    shapes: (n, m) of each matrix, in the order in which they lie in the flat tensor. The basis is the same on all
    ranks: it is made from what the all-reduce gave.
    """

    collective: Collective = "sum"
    feedback = True
    block = 1

    def __init__(self, rank: int, shapes: list[tuple[int, int]], key: Key, device: torch.device) -> None:
        self.shapes = shapes
        self.ranks = [min(rank, n, m) for n, m in shapes]
        self.left = True  # whether this step sends P (n, r), on the basis Q (m, r); else Q, on the basis P
        generator = key.generator(device, shared=True)
        drawn = [
            torch.randn(m, r, generator=generator, device=device) for (_, m), r in zip(shapes, self.ranks, strict=True)
        ]
        self.basis = [orthonormal(factor) for factor in drawn]
        self._taken: dict[int, Tensor] = {}

    def matrices(self, x: Tensor) -> list[Tensor]:
        parts = torch.split(x, [n * m for n, m in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def sides(self, x: Tensor) -> list[Tensor]:
        """The matrices as the basis' transpose is multiplied with them: X' on the basis Q, X on the basis P."""
        return [matrix.T if self.left else matrix for matrix in self.matrices(x)]

    def factors(self, payload: Tensor) -> list[Tensor]:
        """The payload as matrices (n, r) or (m, r), column by column: many times faster to multiply than by rows."""
        rows = [(n if self.left else m, r) for (n, m), r in zip(self.shapes, self.ranks, strict=True)]
        parts = torch.split(payload, [n * r for n, r in rows])
        return [part.view(r, n).T for part, (n, r) in zip(parts, rows, strict=True)]

    def encode(self, x: Tensor, key: Key) -> Tensor:
        """(n,) -> (sum of n r or m r,) float32"""
        sides = self.sides(x.float())
        return torch.cat([(basis.T @ side).flatten() for side, basis in zip(sides, self.basis, strict=True)])

    def take(self, number: int, total: Tensor, residual: Tensor, gradient: Tensor) -> None:
        """Set one matrix' total to residual + gradient less what of it is sent, and keep that for `taken`.

        All are (n, m), total and residual float32. On a CPU block by block, so that they come from memory once.
        """
        basis = self.basis[number]
        if self.left:
            parts = []
            for x, old, new in in_blocks(total, residual, gradient):
                torch.add(old, new, out=x)
                parts.append(basis.T @ x.T)
                x.T.addmm_(basis, parts[-1], alpha=-1)
            factor = torch.cat(parts, dim=1)
        else:
            factor = total.new_zeros(basis.shape[1], total.shape[1])
            for x, old, new, part in in_blocks(total, residual, gradient, basis):
                torch.add(old, new, out=x)
                factor.addmm_(part.T, x)
            total.addmm_(basis, factor, alpha=-1)
        self._taken[number] = factor.flatten()

    def taken(self) -> Tensor:
        """What `take` took of all matrices: as `encode` has it."""
        payload = torch.cat([self._taken[number] for number in range(len(self.shapes))])
        self._taken.clear()
        return payload

    def decode(self, payload: Tensor, n: int, key: Key) -> Tensor:
        return decode_by_adding(self, payload, n, key)

    def add(self, total: Tensor, payload: Tensor, key: Key, alpha: float = 1, fresh: bool = False) -> None:
        for matrix, factor, basis in zip(self.matrices(total), self.factors(payload), self.basis, strict=True):
            left, right = (factor, basis) if self.left else (basis, factor)
            for block, part in in_blocks(matrix, left):
                block.addmm_(part, right.T, beta=0 if fresh else 1, alpha=alpha)

    def advance(self, total: Tensor) -> None:
        """Take what all ranks sent together as the next step's basis."""
        self.basis = [orthonormal(factor) for factor in self.factors(total)]
        self.left = not self.left


def in_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each matrix (n, any) after the other: on a CPU blocks of the first one's size, on a GPU all."""
    rows = len(matrices[0]) if matrices[0].is_cuda else -(-BLOCK // matrices[0].shape[1])
    return zip(*(torch.split(matrix, rows) for matrix in matrices), strict=True)


def orthonormal(factor: Tensor) -> Tensor:
    """An orthonormal basis of at least the columns' span: (n, r) -> (n, r), column by column."""
    basis: Tensor = torch.linalg.qr(factor).Q
    return basis.T.contiguous().T
