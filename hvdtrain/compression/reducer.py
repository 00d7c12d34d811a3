"""A bucket's way over the ranks: encode, one or two collectives, decode, and the error-feedback memory.

`start` is called as soon as the bucket is full; `turn` when its first collective has arrived, at the latest when all
buckets have been started; `finish` after that. So second collectives of all buckets are under way before any is waited
for, and ranks may finish buckets in any order.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import AddingCodec, Codec, RandomKey
from hvdtrain.compression.powersgd import PowerSgd


class Reducer:
    """What Plain and Channel share: `flat`, (n,), is summed or averaged over the ranks of `group`, once per step."""

    def __init__(self, name: str, flat: Tensor, average: bool, group: collectives.Group) -> None:
        self.name, self.flat, self.average, self.group = name, flat, average, group
        self.size = collectives.size(group)
        self.waited = 0.0  # seconds that `turn` and `finish` of the last step waited
        self.owed: Tensor | None = None  # (n,): what an earlier way over the ranks had not sent; sent until it counts
        self._handle: collectives.Handle | None = None

    def _add_carried_over(self, x: Tensor) -> None:
        self.waited = 0.0
        if self.owed is not None:
            x += self.owed

    def commit_step(self, unused: Sequence[tuple[int, int]] = ()) -> None:
        """A step is made with what was sent: it is owed no more, but for the places that nobody uses."""
        owed, self.owed = self.owed, None
        if owed is not None and unused:
            self.owed = torch.zeros_like(owed)
            for begin, end in unused:
                self.owed[begin:end] = owed[begin:end]

    def _wait_for_collective(self) -> Tensor:
        """What the collective under way has brought."""
        assert self._handle is not None
        begin = time.perf_counter()
        received = collectives.wait(self._handle)
        self.waited += time.perf_counter() - begin
        self._handle = None
        return received


class PlainReducer(Reducer):
    """Sums or averages `flat` by one all-reduce."""

    def __init__(self, name: str, flat: Tensor, average: bool, group: collectives.Group = None) -> None:
        super().__init__(name, flat, average, group)

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a step."""
        return collectives.ring_all_reduce_bytes(self.flat.numel() * self.flat.element_size(), self.size)

    def start_reduction(self, step: int) -> None:
        self._add_carried_over(self.flat)
        self._handle = collectives.all_reduce_async_(self.flat, self.name, self.average, self.group)

    def start_second_round(self, wait: bool = True) -> None:
        """There is no second collective."""

    def finish_reduction(self) -> None:
        self._wait_for_collective()

    def sum_is_finite(self) -> bool:
        """Whether the sum is finite; the same on all ranks."""
        # The sum of float16 values that are finite may not be.
        return bool(torch.isfinite(self.flat.sum(dtype=torch.promote_types(self.flat.dtype, torch.float32))))

    def total_unsent(self) -> Tensor | None:
        """(n,) what this rank's shares still have to send, or None."""
        return self.owed


class CompressedReducer(Reducer):
    """Sums or averages `flat` by a codec.

    flat: (n,) float32 on any device; this rank's share at `start`, at the end of `finish` the sum as it was decoded,
    the same bits on all ranks. residual: what this rank's share has not sent yet, in the same units, or None; without
    `commit` it stands over, so that neither inf nor NaN enters it. momentum: DGC's correction (1712.01887):
    velocities are accumulated in place of gradients, and masked where they are sent late.
    """

    def __init__(
        self,
        name: str,
        flat: Tensor,
        codec: Codec,
        key: RandomKey,
        average: bool = False,
        group: collectives.Group = None,
        *,
        feedback: bool | None = None,
        warmup: int = 0,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(name, flat, average, group)
        self.codec = codec
        self.seed, self.bucket, self.rank = key.seed, key.bucket, key.rank
        self.warmup, self.momentum = warmup, momentum
        remembers = codec.feedback if feedback is None else feedback
        self.residual = torch.zeros_like(flat) if remembers else None
        # The residual to be, if this step's sum is finite; then the two change places.
        self.next_residual = torch.zeros_like(flat) if remembers else None
        self.velocity = torch.zeros_like(flat) if momentum else None
        # An exchange cuts flat into as many parts as ranks, whole blocks each; a part's owner has a memory for its sum.
        self.part_size = -(-len(flat) // (self.size * codec.block_size)) * codec.block_size
        exchanges = codec.collective == "exchange"
        self.owned = torch.zeros(self.part_size, device=flat.device) if remembers and exchanges else None
        self.wire_bytes = 0  # sent by this rank in the last step, both rounds
        self._pending_memories: dict[str, Tensor] = {}  # other memories to be
        self._key = key
        self._in_warmup = False
        self._all_rounds_started = True
        self._received = flat

    def fuses_residual(self, step: int) -> bool:
        """Whether whoever has the share in pieces should add the residual to them, into `spare`, in one go.

        With powersgd by its `take`, matrix by matrix.
        """
        return self.residual is not None and self.velocity is None and self.owed is None and step >= self.warmup

    def start_reduction(self, step: int, added_up: bool = False) -> None:
        """Encode the share and the residual and start the first collective; in the warm-up one of all values.

        added_up: they were added up (`adds_up`), and are not in flat.
        """
        self._pending_memories.clear()
        self._in_warmup = step < self.warmup
        self._all_rounds_started = self._in_warmup or self.codec.collective != "exchange"  # nothing more to start
        self._key = RandomKey(self.seed, step, self.bucket, self.rank)
        if self.velocity is not None:
            velocity = self._pending_memories["velocity"] = torch.add(self.flat, self.velocity, alpha=self.momentum)
            self.flat.copy_(velocity)
        if self._in_warmup:
            self._add_carried_over(self.flat)
            self.wire_bytes = collectives.ring_all_reduce_bytes(self.flat.numel() * self.flat.element_size(), self.size)
            self._handle = collectives.all_reduce_async_(self.flat, f"{self.name}.dense", self.average, self.group)
            return
        if self.residual is not None and self.next_residual is not None and not added_up:
            torch.add(self.flat, self.residual, out=self.next_residual)
        x = self.flat if self.next_residual is None else self.next_residual
        self._add_carried_over(x)
        collective = self.codec.collective
        rest = self.next_residual  # what the payload is still to be taken from
        if added_up and isinstance(self.codec, PowerSgd):
            payload, rest = self.codec.pop_fused_payload(), None
        else:
            payload = self.codec.encode(self._pad_into_rows(x) if collective == "exchange" else x, self._key)
        # The network is busy while the residual is worked out; a sum is made in place, so of a copy.
        sent = payload.clone() if collective == "sum" and rest is not None else payload
        if collective == "exchange":
            # Its own part stays here.
            self.wire_bytes = payload[0].numel() * (self.size - 1)
            self._handle = collectives.all_to_all_async(sent.flatten(), f"{self.name}.parts", self.group)
        elif collective == "sum":
            self.wire_bytes = collectives.ring_all_reduce_bytes(payload.numel() * payload.element_size(), self.size)
            self._handle = collectives.all_reduce_async_(sent, f"{self.name}.sum", group=self.group)
        else:
            self.wire_bytes = payload.numel() * (self.size - 1)
            self._handle = collectives.all_gather_async(sent, f"{self.name}.gather", self.group)
        if rest is not None:
            self._subtract_payload(payload, rest)

    def _subtract_payload(self, payload: Tensor, x: Tensor) -> None:
        """Leave in x what the payload does not send."""
        if self.velocity is not None and self.residual is not None:
            # A velocity whose gradients are sent late is stale; one sent at once goes on as in plain momentum.
            own = self.codec.decode(payload, len(x), self._key)
            self._pending_memories["velocity"].masked_fill_((own != 0) & (self.residual != 0), 0)
        if self.codec.collective == "exchange":
            x -= self._flatten_rows(self.codec.decode(payload, self.part_size, self._key))
        else:
            cast(AddingCodec, self.codec).add_decoded(x, payload, self._key, -1)

    def start_second_round(self, wait: bool = True) -> None:
        """Wait for the first collective and start the second, if there is one; or do so only if it has arrived."""
        if self._all_rounds_started or not (
            wait or (self._handle is not None and collectives.is_complete(self._handle))
        ):
            return
        self._all_rounds_started = True
        parts = self._wait_for_collective().view(self.size, -1)
        total = self.codec.decode(parts, self.part_size, self._key).sum(0)
        if self.owned is not None:
            total.add_(self.owned)
        payload = self.codec.encode(total[None], replace(self._key, round=1))
        if self.owned is not None:
            self._pending_memories["owned"] = total - self.codec.decode(payload, self.part_size, self._key)[0]
        self.wire_bytes += payload.numel() * (self.size - 1)
        self._handle = collectives.all_gather_async(payload.flatten(), f"{self.name}.sums", self.group)

    def finish_reduction(self) -> None:
        """Wait and decode the sum, or mean, into flat."""
        received = self._received = self._wait_for_collective()
        scale = 1 / self.size if self.average else 1.0
        if self._in_warmup:
            pass  # reduced in place
        elif self.codec.collective == "exchange":
            rows = self.codec.decode(received.view(self.size, -1), self.part_size, self._key)
            torch.mul(self._flatten_rows(rows), scale, out=self.flat)
        else:
            # In the order of ranks on every rank, so that the sums are the same to the bit.
            payloads = received.view(self.size, -1) if self.codec.collective == "gather" else received[None]
            for i, payload in enumerate(payloads):
                cast(AddingCodec, self.codec).add_decoded(self.flat, payload, self._key, scale, fresh=i == 0)

    def sum_is_finite(self) -> bool:
        """Whether the sum is finite; the same on all ranks."""
        checked = self._received if self.codec.collective == "sum" else self.flat
        return bool(torch.isfinite(checked.sum(dtype=torch.float32)))

    def commit_step(self, unused: Sequence[tuple[int, int]] = ()) -> None:
        """Take over the step's memories. Not called where any bucket's sum is not finite: no step is made then.

        unused: where in flat what was decoded is not used by anyone; all ranks together owe it again.
        """
        if isinstance(self.codec, PowerSgd) and not self._in_warmup:
            self.codec.update_bases(self._received)
        if not self._in_warmup:
            self.residual, self.next_residual = self.next_residual, self.residual
        for name, memory in self._pending_memories.items():
            setattr(self, name, memory)
        if self.residual is None:
            super().commit_step(unused)
            return
        self.owed = None
        for begin, end in unused:
            self.residual[begin:end] += self.flat[begin:end] / (1 if self.average else self.size)

    def total_unsent(self) -> Tensor | None:
        """(n,) what this rank's shares still have to send, and the sum of the part that it owns; or None."""
        if self.residual is None:
            return self.owed
        debt = self.residual.clone() if self.owed is None else self.residual + self.owed
        if self.owned is not None:
            begin = min(self.rank * self.part_size, len(debt))
            mine = debt[begin : begin + self.part_size]
            mine += self.owned[: len(mine)]
        return debt

    def _pad_into_rows(self, flat: Tensor) -> Tensor:
        """(n,) -> (size, part). The last block is filled up with its own values again, what is behind it with zeros.

        Zeros in a block would make its scale too small (onebit's is a mean), and its values arrive steps too late.
        """
        missing = self.size * self.part_size - len(flat)
        if missing:
            last = flat[(len(flat) - 1) // self.codec.block_size * self.codec.block_size :]
            again = last.repeat(-(-self.codec.block_size // len(last)))[len(last) : self.codec.block_size]
            flat = torch.cat([flat, again, flat.new_zeros(missing - len(again))])
        return flat.view(self.size, self.part_size)

    def _flatten_rows(self, rows: Tensor) -> Tensor:
        return rows.flatten()[: len(self.flat)]
