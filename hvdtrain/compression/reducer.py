"""How a bucket is summed over ranks: encode, one or two collectives, decode, and error feedback.

Error feedback (Karimireddy et al., 1901.09847), of a rank in step k; g its gradients, C encode-and-decode:

    x_k     = g_k + residual_k                what should be sent
    sent_k  = C(x_k)                          what is sent
    residual_{k+1} = x_k - sent_k             what is not, and is sent later

Collective.ALL_REDUCE and ALL_GATHER take one round. REDUCE_SCATTER takes two, with a second encoding and, for that, a
second residual, which the owner of a part has (`shard_residual`, s):

               rank 0                       rank 1                        ... size ranks, a part of x for each
    start      encode x = [x0 | x1]         encode x = [x0 | x1]
               ------------------- all-to-all: part i goes to rank i -------------------
    second     t = sum C(x0) + s            t = sum C(x1) + s             decode and sum the own part of all ranks
    round      encode t; s = t - C(t)       encode t; s = t - C(t)
               ------------------- all-gather: all parts to all ranks -------------------
    finish     flat = [C(t0) | C(t1)]       flat = [C(t0) | C(t1)]        the same bits on all ranks

A bucket is started (`start_reduction`) as soon as it is full; its second round when the first has arrived, at the
latest when all buckets have been started; then it is finished. So the second rounds of all buckets are under way before
any is waited for, and ranks may finish buckets in any order. Nothing of a step is kept before `commit_step`, which is
not called if any bucket's sum is not finite: so neither inf nor NaN enters a residual.

A residual stays in its reducer. What an earlier reducer of the bucket had not sent (another method, another world) is
`carried_over`: it is added to each step's share until a step is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import Codec, Collective, FusedCodec, RandomKey, StatefulCodec
from hvdtrain.compression.plain_reducer import Reducer


@dataclass(frozen=True, kw_only=True)
class ReducerOptions:
    """How a compressed reducer sums."""

    average: bool = False  # whether the sum is divided by the number of ranks
    group: collectives.Group = None  # the ranks; None: all
    feedback: bool | None = None  # whether there is a residual; None: as the codec has it
    warmup: int = 0  # steps without compression at the beginning
    momentum: float = 0.0  # momentum correction


class CompressedReducer(Reducer):
    """Sums or averages `flat` by a codec.

    With momentum correction (DGC, Lin et al., 1712.01887) velocities v_k = m v_{k-1} + g_k are sent in place of the
    gradients, and set to 0 at the values that are sent late.

    Attributes:
        codec: the codec.
        residual: (n,) float32: what this rank has not sent yet; or None.
        next_residual: (n,) float32: the residual of the next step if this one is committed; then the two swap.
        velocity: (n,) float32, or None without momentum correction.
        part_size: of the part of flat that each rank sums for REDUCE_SCATTER: whole blocks.
        parts: by rank, which of these parts it sums.
        shard_residual: (part_size,) float32: the residual of the sums of this rank's part; or None.
        wire_bytes: bytes that this rank sent in the last step, in both rounds.
    """

    def __init__(
        self,
        name: str,
        flat: Tensor,
        codec: Codec,
        key: RandomKey,
        options: ReducerOptions = ReducerOptions(),
    ) -> None:
        """Make a reducer without a history, on all ranks of the group.

        Args:
            name: of its collectives.
            flat: (n,) float32 on any device.
            codec: used by no other reducer.
            key: seed, bucket and rank of its randomness; steps and rounds are counted here.
            options: how it sums.
        """
        super().__init__(name, flat, options.average, options.group)
        self.codec = codec
        self.seed, self.bucket, self.rank = key.seed, key.bucket, key.rank
        self.warmup, self.momentum = options.warmup, options.momentum
        has_residual = codec.feedback if options.feedback is None else options.feedback
        self.residual = torch.zeros_like(flat) if has_residual else None
        self.next_residual = torch.zeros_like(flat) if has_residual else None
        self.velocity = torch.zeros_like(flat) if options.momentum else None
        self.part_size = -(-len(flat) // (self.size * codec.block_size)) * codec.block_size
        in_parts = codec.collective is Collective.REDUCE_SCATTER
        self.shard_residual = torch.zeros(self.part_size, device=flat.device) if has_residual and in_parts else None
        self.parts = tuple(range(self.size))
        self.wire_bytes = 0
        self._pending_velocity: Tensor | None = None  # this step's, if it is committed
        self._pending_shard_residual: Tensor | None = None
        self._key = key
        self._in_warmup = False
        self._all_rounds_started = True
        self._received = flat

    def fuses_residual(self, step: int) -> bool:
        """Return whether the share is to be added to the residual piece by piece, as gradients come, in one pass.

        Then whoever has a piece adds it, into `next_residual`; if the codec is a `FusedCodec`, by its `encode_fused`.
        """
        return self.residual is not None and self.velocity is None and self.carried_over is None and step >= self.warmup

    def start_reduction(self, step: int, fused: bool = False) -> None:
        """Encode the share and the residual and start the first collective; in the warm-up an all-reduce of the share.

        Args:
            step: counted from 0.
            fused: whether share and residual have been added already (`fuses_residual`); flat does not hold the share.
        """
        self._pending_velocity = self._pending_shard_residual = None
        self._in_warmup = step < self.warmup
        collective = self.codec.collective
        self._all_rounds_started = self._in_warmup or collective is not Collective.REDUCE_SCATTER
        self._key = RandomKey(self.seed, step, self.bucket, self.rank)
        if self.velocity is not None:
            self._pending_velocity = torch.add(self.flat, self.velocity, alpha=self.momentum)
            self.flat.copy_(self._pending_velocity)
        if self._in_warmup:
            self._add_carried_over(self.flat)
            self.wire_bytes = collectives.ring_all_reduce_bytes(self.flat.numel() * self.flat.element_size(), self.size)
            self._handle = collectives.all_reduce_async_(self.flat, f"{self.name}.dense", self.average, self.group)
            return
        if self.residual is not None and self.next_residual is not None and not fused:
            torch.add(self.flat, self.residual, out=self.next_residual)
        x = self.flat if self.next_residual is None else self.next_residual
        self._add_carried_over(x)
        self._send(x, fused)

    def _send(self, x: Tensor, fused: bool) -> None:
        """Encode x, (n,), the share and the residual, and start the first collective; keep what it does not send."""
        collective = self.codec.collective
        remainder = self.next_residual  # what the payload is still to be subtracted from
        if fused and isinstance(self.codec, FusedCodec):
            payload, remainder = self.codec.pop_fused_payload(), None
        else:
            rows = self._pad_into_rows(x) if collective is Collective.REDUCE_SCATTER else x
            payload = self.codec.encode(rows, self._key)
        # The network is busy while the residual is computed; an all-reduce works in place, so on a copy.
        self._start_collective(
            payload.clone() if collective is Collective.ALL_REDUCE and remainder is not None else payload
        )
        if remainder is not None:
            self._subtract_payload(payload, remainder)

    def _start_collective(self, payload: Tensor) -> None:
        match self.codec.collective:
            case Collective.REDUCE_SCATTER:
                self.wire_bytes = payload[0].numel() * (self.size - 1)  # its own part stays here
                self._handle = collectives.all_to_all_async(payload.flatten(), f"{self.name}.parts", self.group)
            case Collective.ALL_REDUCE:
                self.wire_bytes = collectives.ring_all_reduce_bytes(payload.numel() * payload.element_size(), self.size)
                self._handle = collectives.all_reduce_async_(payload, f"{self.name}.sum", group=self.group)
            case Collective.ALL_GATHER:
                self.wire_bytes = payload.numel() * (self.size - 1)
                self._handle = collectives.all_gather_async(payload, f"{self.name}.gather", self.group)

    def _subtract_payload(self, payload: Tensor, x: Tensor) -> None:
        """Leave in x what the payload does not send."""
        if self._pending_velocity is not None and self.residual is not None:
            # A velocity whose gradients are sent late is stale; one sent at once continues as in plain momentum.
            own = self.codec.decode(payload, len(x), self._key)
            self._pending_velocity.masked_fill_((own != 0) & (self.residual != 0), 0)
        if self.codec.collective is Collective.REDUCE_SCATTER:
            x -= self._flatten_rows(self.codec.decode(payload, self.part_size, self._key))
        else:
            self.codec.add_decoded(x, payload, self._key, -1)

    def start_second_round(self, wait: bool = True) -> None:
        """Start the second collective, if there is one, when the first has arrived.

        Args:
            wait: for the first; else do nothing if it has not arrived.
        """
        total = self._take_first_round(wait)
        if total is None:
            return
        payload = self._encode_sum(total)
        self.wire_bytes += payload.numel() * (self.size - 1)
        group = collectives.second_round_group(self.group)
        self._handle = collectives.all_gather_async(payload.flatten(), f"{self.name}.sums", group)

    def _encode_sum(self, total: Tensor) -> Tensor:
        """Return the payload, in one row, of (part_size,) the sum of this rank's part; keep what it leaves."""
        if self.shard_residual is not None:
            total.add_(self.shard_residual)
        payload = self.codec.encode(total[None], replace(self._key, round=1))
        if self.shard_residual is not None:
            self._pending_shard_residual = total - self.codec.decode(payload, self.part_size, self._key)[0]
        return payload

    def _take_first_round(self, wait: bool) -> Tensor | None:
        """Return (part_size,) the sum of this rank's part; None if there is none to take, or it has not arrived.

        wait: for it.
        """
        if self._all_rounds_started or not (
            wait or (self._handle is not None and collectives.is_complete(self._handle))
        ):
            return None
        self._all_rounds_started = True
        parts = self._wait_for_collective().view(self.size, -1)
        return self.codec.decode(parts, self.part_size, self._key).sum(0)

    def finish_reduction(self) -> None:
        """Wait and decode the sum, or mean, into flat."""
        received = self._received = self._wait_for_collective()
        scale = 1 / self.size if self.average else 1.0
        if self._in_warmup:
            pass  # reduced in place
        elif self.codec.collective is Collective.REDUCE_SCATTER:
            rows = self.codec.decode(received.view(self.size, -1), self.part_size, self._key)
            torch.mul(self._flatten_rows(rows), scale, out=self.flat)
        else:
            # In the order of ranks on every rank, so that the sums are the same to the bit.
            gathered = self.codec.collective is Collective.ALL_GATHER
            for i, payload in enumerate(received.view(self.size, -1) if gathered else received[None]):
                self.codec.add_decoded(self.flat, payload, self._key, scale, fresh=i == 0)

    def sum_is_finite(self) -> bool:
        """Return whether the sum is finite; the same on all ranks."""
        checked = self._received if self.codec.collective is Collective.ALL_REDUCE else self.flat
        return bool(torch.isfinite(checked.sum(dtype=torch.float32)))

    def commit_step(self, unused: Sequence[tuple[int, int]] = ()) -> None:
        """Take over the step's residuals, velocity and codec state; not if any bucket's sum is not finite.

        Args:
            unused: ranges of flat whose sum nobody uses; all ranks together have it unsent again.
        """
        if isinstance(self.codec, StatefulCodec) and not self._in_warmup:
            self.codec.advance(self._received)
        if not self._in_warmup:
            self.residual, self.next_residual = self.next_residual, self.residual
        if self._pending_velocity is not None:
            self.velocity = self._pending_velocity
        if self._pending_shard_residual is not None:
            self.shard_residual = self._pending_shard_residual
        if self.residual is None:
            super().commit_step(unused)
            return
        self.carried_over = None
        for begin, end in unused:
            self.residual[begin:end] += self.flat[begin:end] / (1 if self.average else self.size)

    def total_unsent(self) -> Tensor | None:
        """Return what this rank still has to send, (n,), of its own share and of the sums of its part; or None."""
        if self.residual is None:
            return self.carried_over
        unsent = self.residual.clone() if self.carried_over is None else self.residual + self.carried_over
        if self.shard_residual is not None:
            begin = min(self.parts[self.rank] * self.part_size, len(unsent))
            own_part = unsent[begin : begin + self.part_size]
            own_part += self.shard_residual[: len(own_part)]
        return unsent

    def _pad_into_rows(self, flat: Tensor) -> Tensor:
        """Return flat, (n,), as (size, part_size): the last block filled with its own values, what follows with zeros.

        Zeros in a block would make its scale too small (onebit's is a mean), and its values arrive steps too late.
        """
        missing = self.size * self.part_size - len(flat)
        if missing:
            again = complete_last_block(flat, self.codec.block_size)
            flat = torch.cat([flat, again, flat.new_zeros(missing - len(again))])
        return flat.view(self.size, self.part_size)

    def _flatten_rows(self, rows: Tensor) -> Tensor:
        """Return (size, part_size) as (n,)."""
        return rows.flatten()[: len(self.flat)]


def complete_last_block(x: Tensor, block_size: int) -> Tensor:
    """Return (fewer than block_size,) what fills the last block of x, (n,): its own values again."""
    count = len(x) % block_size
    last = x[len(x) - count :]
    return last.repeat(-(-block_size // max(1, count)))[count:block_size]
