"""A bucket's way over the ranks: encode, one or two collectives, decode, and the error-feedback memory.

`start` is called as soon as the bucket is full, `turn` when all buckets have been started, `finish` after that: so that
second collectives of all buckets are under way before any is waited for, and ranks may finish buckets in any order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hvdtrain.collectives import ops
from hvdtrain.compression.codec import Codec, Key
from hvdtrain.compression.powersgd import PowerSgd


class Plain:
    """Sums or averages `flat` over ranks in place by one all-reduce; the same interface as Channel's."""

    def __init__(self, name: str, flat: Tensor, size: int, average: bool) -> None:
        self.name, self.flat, self.size, self.average = name, flat, size, average
        self._handle: ops.Handle | None = None

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a step."""
        return ops.ring_bytes(self.flat.numel() * self.flat.element_size(), self.size)

    def start(self, step: int) -> None:
        self._handle = ops.all_reduce_async_(self.flat, self.name, self.average)

    def turn(self) -> None:
        """There is no second collective."""

    def finish(self) -> None:
        assert self._handle is not None
        ops.wait(self._handle)
        self._handle = None

    def finite(self) -> bool:
        """Whether the sum is finite; the same on all ranks."""
        return bool(torch.isfinite(self.flat.sum()))


class Channel:
    """Sums `flat` over ranks in place, once per step.

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
        key: Key,
        size: int,
        *,
        feedback: bool | None = None,
        warmup: int = 0,
        momentum: float = 0.0,
    ) -> None:
        self.name, self.flat, self.codec, self.size = name, flat, codec, size
        self.seed, self.bucket, self.rank = key.seed, key.bucket, key.rank
        self.warmup, self.momentum = warmup, momentum
        remembers = codec.feedback if feedback is None else feedback
        self.residual = torch.zeros_like(flat) if remembers else None
        self.velocity = torch.zeros_like(flat) if momentum else None
        # An exchange cuts flat into as many parts as ranks, whole blocks each; a part's owner has a memory for its sum.
        self.part = -(-len(flat) // (size * codec.block)) * codec.block
        exchanges = codec.collective == "exchange"
        self.owned = torch.zeros(self.part, device=flat.device) if remembers and exchanges else None
        self.wire_bytes = 0  # sent by this rank in the last step, both rounds
        # Memories to be, if this step's sum is finite.
        self._kept: dict[str, Tensor] = {}
        self._key = key
        self._dense = False
        self._received = flat
        self._handle: ops.Handle | None = None

    def start(self, step: int) -> None:
        """Add the residual, encode and start the first collective; in the warm-up an all-reduce of all values."""
        self._kept.clear()
        self._dense = step < self.warmup
        self._key = Key(self.seed, step, self.bucket, self.rank)
        if self.velocity is not None:
            velocity = torch.add(self.flat, self.velocity, alpha=self.momentum)
            self._kept["velocity"] = velocity
            self.flat.copy_(velocity)
        if self._dense:
            self.wire_bytes = ops.ring_bytes(self.flat.numel() * self.flat.element_size(), self.size)
            self._handle = ops.all_reduce_async_(self.flat, f"{self.name}.dense")
            return
        if self.residual is not None:
            self.flat.add_(self.residual)
        collective = self.codec.collective
        rows = self._rows(self.flat) if collective == "exchange" else self.flat
        payload = self.codec.encode(rows, self._key)
        if self.residual is not None:
            own = self.codec.decode(payload, rows.shape[-1], self._key)
            own = self._flatten(own) if collective == "exchange" else own
            self._kept["residual"] = self.flat - own
            if self.velocity is not None:
                # A velocity whose gradients are sent late is stale; one sent at once goes on as in plain momentum.
                late = (own != 0) & (self.residual != 0)
                self._kept["velocity"] = velocity.masked_fill(late, 0)
        if collective == "exchange":
            # Its own part stays here.
            self.wire_bytes = payload[0].numel() * (self.size - 1)
            self._handle = ops.all_to_all_async(payload.flatten(), f"{self.name}.parts")
        elif collective == "sum":
            # What the codec does not look at must not hide what is not finite.
            payload = payload.add_(self.flat.sum() * 0)
            self.wire_bytes = ops.ring_bytes(payload.numel() * payload.element_size(), self.size)
            self._handle = ops.all_reduce_async_(payload, f"{self.name}.sum")
        else:
            self.wire_bytes = payload.numel() * (self.size - 1)
            self._handle = ops.all_gather_async(payload, f"{self.name}.gather")

    def turn(self) -> None:
        """Wait for the first collective and start the second, if there is one."""
        if self._dense or self.codec.collective != "exchange":
            return
        assert self._handle is not None
        parts = ops.wait(self._handle).view(self.size, -1)
        total = self.codec.decode(parts, self.part, self._key).sum(0)
        if self.owned is not None:
            total.add_(self.owned)
        payload = self.codec.encode(total[None], replace(self._key, round=1))
        if self.owned is not None:
            self._kept["owned"] = total - self.codec.decode(payload, self.part, self._key)[0]
        self.wire_bytes += payload.numel() * (self.size - 1)
        self._handle = ops.all_gather_async(payload.flatten(), f"{self.name}.sums")

    def finish(self) -> None:
        """Wait and decode the sum into flat."""
        assert self._handle is not None
        received = ops.wait(self._handle)
        self._handle = None
        n = len(self.flat)
        if self._dense:
            pass  # reduced in place
        elif self.codec.collective == "exchange":
            self.flat.copy_(self._flatten(self.codec.decode(received.view(self.size, -1), self.part, self._key)))
        elif self.codec.collective == "sum":
            self.flat.copy_(self.codec.decode(received, n, self._key))
        else:
            self.flat.zero_()
            # In the order of ranks on every rank, so that the sums are the same to the bit.
            for payload in received.view(self.size, -1):
                self.flat.add_(self.codec.decode(payload, n, self._key))
        self._received = received

    def finite(self) -> bool:
        """Whether the sum is finite; the same on all ranks."""
        return bool(torch.isfinite(self.flat.sum()))

    def commit(self) -> None:
        """Take over the step's memories. Not called where any bucket's sum is not finite: no step is made then."""
        if isinstance(self.codec, PowerSgd) and not self._dense:
            self.codec.advance(self._received)
        for name, memory in self._kept.items():
            setattr(self, name, memory)

    def owe(self, begin: int, end: int) -> None:
        """What was decoded of flat[begin:end] is not used by anyone: all ranks together owe it again."""
        if self.residual is not None:
            self.residual[begin:end] += self.flat[begin:end] / self.size

    def _rows(self, flat: Tensor) -> Tensor:
        """(n,) -> (size, part). The last block is filled up with its own values again, what is behind it with zeros.

        Zeros in a block would make its scale too small (onebit's is a mean), and its values arrive steps too late.
        """
        missing = self.size * self.part - len(flat)
        if missing:
            last = flat[(len(flat) - 1) // self.codec.block * self.codec.block :]
            again = last.repeat(-(-self.codec.block // len(last)))[len(last) : self.codec.block]
            flat = torch.cat([flat, again, flat.new_zeros(missing - len(again))])
        return flat.view(self.size, self.part)

    def _flatten(self, rows: Tensor) -> Tensor:
        return rows.flatten()[: len(self.flat)]
