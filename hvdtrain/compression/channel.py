"""A bucket's way over the ranks: encode, one or two collectives, decode, and the error-feedback memory.

`start` is called as soon as the bucket is full, `turn` when all buckets have been started, `finish` after that: so that
second collectives of all buckets are under way before any is waited for, and ranks may finish buckets in any order.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from hvdtrain.collectives import ops
from hvdtrain.compression.codec import Adding, Codec, Key
from hvdtrain.compression.powersgd import PowerSgd


class Way:
    """What Plain and Channel share: `flat`, (n,), is summed over the ranks of `group` in place, once per step."""

    def __init__(self, name: str, flat: Tensor, group: ops.Group) -> None:
        self.name, self.flat, self.group, self.size = name, flat, group, ops.size(group)
        self.waited = 0.0  # seconds that `turn` and `finish` of the last step waited
        self.owed: Tensor | None = None  # (n,): what an earlier way over the ranks had not sent yet; sent once
        self._handle: ops.Handle | None = None

    def _begin(self) -> None:
        self.waited = 0.0
        if self.owed is not None:
            self.flat += self.owed
            self.owed = None

    def _wait(self) -> Tensor:
        """What the collective under way has brought."""
        assert self._handle is not None
        begin = time.perf_counter()
        received = ops.wait(self._handle)
        self.waited += time.perf_counter() - begin
        self._handle = None
        return received


class Plain(Way):
    """Sums or averages `flat` by one all-reduce."""

    def __init__(self, name: str, flat: Tensor, average: bool, group: ops.Group = None) -> None:
        super().__init__(name, flat, group)
        self.average = average

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sends in a step."""
        return ops.ring_bytes(self.flat.numel() * self.flat.element_size(), self.size)

    def start(self, step: int) -> None:
        self._begin()
        self._handle = ops.all_reduce_async_(self.flat, self.name, self.average, self.group)

    def turn(self) -> None:
        """There is no second collective."""

    def finish(self) -> None:
        self._wait()

    def finite(self) -> bool:
        """Whether the sum is finite; the same on all ranks."""
        return bool(torch.isfinite(self.flat.sum()))

    def debt(self) -> Tensor | None:
        """(n,) what this rank's shares still have to send, or None."""
        return self.owed


class Channel(Way):
    """Sums `flat` by a codec.

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
        group: ops.Group = None,
        *,
        feedback: bool | None = None,
        warmup: int = 0,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(name, flat, group)
        self.codec = codec
        self.seed, self.bucket, self.rank = key.seed, key.bucket, key.rank
        self.warmup, self.momentum = warmup, momentum
        remembers = codec.feedback if feedback is None else feedback
        self.residual = torch.zeros_like(flat) if remembers else None
        self.velocity = torch.zeros_like(flat) if momentum else None
        # An exchange cuts flat into as many parts as ranks, whole blocks each; a part's owner has a memory for its sum.
        self.part = -(-len(flat) // (self.size * codec.block)) * codec.block
        exchanges = codec.collective == "exchange"
        self.owned = torch.zeros(self.part, device=flat.device) if remembers and exchanges else None
        self.wire_bytes = 0  # sent by this rank in the last step, both rounds
        # Memories to be, if this step's sum is finite; the residual's memory is not made anew each time.
        self._kept: dict[str, Tensor] = {}
        self._spare = torch.empty_like(flat) if remembers else None
        self._key = key
        self._dense = False
        self._received = flat

    def start(self, step: int) -> None:
        """Add the residual, encode and start the first collective; in the warm-up an all-reduce of all values."""
        self._begin()
        self._kept.clear()
        self._dense = step < self.warmup
        self._key = Key(self.seed, step, self.bucket, self.rank)
        if self.velocity is not None:
            velocity = torch.add(self.flat, self.velocity, alpha=self.momentum)
            self._kept["velocity"] = velocity
            self.flat.copy_(velocity)
        if self._dense:
            self.wire_bytes = ops.ring_bytes(self.flat.numel() * self.flat.element_size(), self.size)
            self._handle = ops.all_reduce_async_(self.flat, f"{self.name}.dense", group=self.group)
            return
        if self.residual is not None:
            self.flat.add_(self.residual)
        collective = self.codec.collective
        payload = self.codec.encode(self._rows(self.flat) if collective == "exchange" else self.flat, self._key)
        # The network is busy while the residual is worked out; a sum is made in place, so of a copy.
        sent = payload.clone() if collective == "sum" and self.residual is not None else payload
        if collective == "exchange":
            # Its own part stays here.
            self.wire_bytes = payload[0].numel() * (self.size - 1)
            self._handle = ops.all_to_all_async(sent.flatten(), f"{self.name}.parts", self.group)
        elif collective == "sum":
            self.wire_bytes = ops.ring_bytes(payload.numel() * payload.element_size(), self.size)
            self._handle = ops.all_reduce_async_(sent, f"{self.name}.sum", group=self.group)
        else:
            self.wire_bytes = payload.numel() * (self.size - 1)
            self._handle = ops.all_gather_async(sent, f"{self.name}.gather", self.group)
        if self.residual is not None:
            self._keep_residual(payload)

    def _keep_residual(self, payload: Tensor) -> None:
        """What flat holds and payload does not send."""
        assert self._spare is not None and self.residual is not None
        if self.codec.collective == "exchange":
            own = self._flatten(self.codec.decode(payload, self.part, self._key))
            torch.sub(self.flat, own, out=self._spare)
        else:
            self._add(self._spare.copy_(self.flat), payload, -1)
        self._kept["residual"] = self._spare
        if self.velocity is not None:
            # A velocity whose gradients are sent late is stale; one sent at once goes on as in plain momentum.
            late = (self._spare != self.flat) & (self.residual != 0)
            self._kept["velocity"].masked_fill_(late, 0)

    def _add(self, total: Tensor, payload: Tensor, alpha: float = 1) -> None:
        cast(Adding, self.codec).add(total, payload, self._key, alpha)

    def turn(self) -> None:
        """Wait for the first collective and start the second, if there is one."""
        if self._dense or self.codec.collective != "exchange":
            return
        parts = self._wait().view(self.size, -1)
        total = self.codec.decode(parts, self.part, self._key).sum(0)
        if self.owned is not None:
            total.add_(self.owned)
        payload = self.codec.encode(total[None], replace(self._key, round=1))
        if self.owned is not None:
            self._kept["owned"] = total - self.codec.decode(payload, self.part, self._key)[0]
        self.wire_bytes += payload.numel() * (self.size - 1)
        self._handle = ops.all_gather_async(payload.flatten(), f"{self.name}.sums", self.group)

    def finish(self) -> None:
        """Wait and decode the sum into flat."""
        received = self._received = self._wait()
        if self._dense:
            pass  # reduced in place
        elif self.codec.collective == "exchange":
            self.flat.copy_(self._flatten(self.codec.decode(received.view(self.size, -1), self.part, self._key)))
        else:
            self.flat.zero_()
            # In the order of ranks on every rank, so that the sums are the same to the bit.
            for payload in received.view(self.size, -1) if self.codec.collective == "gather" else (received,):
                self._add(self.flat, payload)

    def finite(self) -> bool:
        """Whether the sum is finite; the same on all ranks."""
        checked = self._received if self.codec.collective == "sum" else self.flat
        return bool(torch.isfinite(checked.sum(dtype=torch.float32)))

    def commit(self) -> None:
        """Take over the step's memories. Not called where any bucket's sum is not finite: no step is made then."""
        if isinstance(self.codec, PowerSgd) and not self._dense:
            self.codec.advance(self._received)
        if "residual" in self._kept:
            self._spare = self.residual
        for name, memory in self._kept.items():
            setattr(self, name, memory)

    def debt(self) -> Tensor | None:
        """(n,) what this rank's shares still have to send, and the sum of the part that it owns; or None."""
        if self.residual is None:
            return self.owed
        debt = self.residual.clone() if self.owed is None else self.residual + self.owed
        if self.owned is not None:
            begin = min(self.rank * self.part, len(debt))
            mine = debt[begin : begin + self.part]
            mine += self.owned[: len(mine)]
        return debt

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
