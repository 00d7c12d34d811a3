"""How a compressed bucket is summed over ranks if each rank needs the sum of its own part only.

The first of the two rounds of `CompressedReducer` is all that gradients take. The second carries, in place of their
sums, what the owners have changed in the parameters since (`encode_own`, `decode_all`): d is the change of a part, and
u what earlier ones have left unsent, which the owner keeps:

               rank 0                            rank 1
    gradients  t = sum C(x0)                     t = sum C(x1)                     all-to-all; decode, sum the own part
    update     d = new0 - old0 + u0              d = new1 - old1 + u1
    all-gather encode d; u0 = d - C(d)           encode d; u1 = d - C(d)
    finish     old + [C(d0) | C(d1)]             old + [C(d0) | C(d1)]             the same bits on all ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hvdtrain.compression.codec import Codec, RandomKey
from hvdtrain.compression.reducer import CompressedReducer, ReducerOptions, complete_last_block
from hvdtrain.compression.scatter_reducer import PartOwner


class CompressedScatterReducer(PartOwner, CompressedReducer):
    """Brings each rank the sum of its own part of `flat`, by a REDUCE_SCATTER codec.

    The parts may differ in length: each is padded to that of the longest, in whole blocks, `part_size`.
    """

    def __init__(
        self,
        name: str,
        flat: Tensor,
        codec: Codec,
        key: RandomKey,
        options: ReducerOptions,
        plain: PartOwner,
    ) -> None:
        """Arguments as of `CompressedReducer`; plain: the reducer whose place this one takes."""
        super().__init__(name, flat, codec, key, options)
        self.set_bounds(plain.bounds, key.rank, plain.parameter_bytes)
        self.part_size = -(-max(self.lengths) // codec.block_size) * codec.block_size
        self.shard_residual = None  # of sums: they are not sent

    @property
    def is_dense(self) -> bool:
        """Whether the present step, of the warm-up, goes without the codec."""
        return self._in_warmup

    def start_reduction(self, step: int, fused: bool = False) -> None:
        super().start_reduction(step, fused)
        # The parameters' part: as large as one of the gradients' if it is encoded.
        dense = self.lengths[self.rank] * self.parameter_bytes * (self.size - 1)
        self.wire_bytes += dense if self._in_warmup else self.wire_bytes

    def start_second_round(self, wait: bool = True) -> None:
        """Sum this rank's part, once it has arrived; the second collective is that of the parameters."""
        total = self._take_first_round(wait)
        if total is not None:
            self.part = total[: self.lengths[self.rank]]
            if self.average:
                self.part /= self.size

    def finish_reduction(self) -> None:
        """Wait for the part; in the warm-up, for all of flat."""
        if self._in_warmup:
            self._received = self._wait_for_collective()
            self.part = self.flat[self.own_range]
        else:
            self.start_second_round()

    def sum_is_finite(self) -> bool:
        """Return whether this rank's part is finite; other ranks see others."""
        return bool(torch.isfinite(self.part.sum(dtype=torch.float32)))

    def commit_step(self, unused: Sequence[tuple[int, int]] = ()) -> None:
        if self.residual is None:
            super().commit_step(unused)
            return
        super().commit_step()
        own = self.own_range
        for begin, end in unused:
            first, last = max(begin, own.start), min(end, own.stop)
            if first < last:
                sent = self.part[first - own.start : last - own.start]
                self.residual[first:last] += sent * (self.size if self.average else 1)

    # The second round.

    def encode_own(self, change: Tensor) -> Tensor:
        """Return the payload of (own values,) float32, the change of this rank's part."""
        row = change.new_zeros(self.part_size)
        self._fill_row(row, change)
        return self.codec.encode(row[None], replace(self._key, round=1)).flatten()

    def decode_own(self, payload: Tensor) -> Tensor:
        """Return (own values,) float32, what all ranks find in this rank's payload."""
        return self.codec.decode(payload[None], self.part_size, self._key)[0][: self.lengths[self.rank]]

    def decode_all(self, gathered: Tensor) -> Tensor:
        """Return (n,) float32 from all ranks' payloads."""
        rows = self.codec.decode(gathered.view(self.size, -1), self.part_size, self._key)
        return self._flatten_rows(rows)

    def _fill_row(self, row: Tensor, part: Tensor) -> None:
        """Write a part into a row: its last block is filled with its own values, as in `_pad_into_rows`."""
        row[: len(part)] = part
        again = complete_last_block(part, self.codec.block_size)
        row[len(part) : len(part) + len(again)] = again

    def _pad_into_rows(self, flat: Tensor) -> Tensor:
        rows = flat.new_zeros(self.size, self.part_size)
        for row, part in zip(rows, torch.split(flat, self.lengths), strict=True):
            self._fill_row(row, part)
        return rows

    def _flatten_rows(self, rows: Tensor) -> Tensor:
        return torch.cat([row[:length] for row, length in zip(rows, self.lengths, strict=True)])
