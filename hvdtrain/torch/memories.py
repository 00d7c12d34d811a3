"""The exchange's memories (residuals, velocities, low-rank bases) as a state, on any number of ranks.

A residual is a debt: what a rank's share of the gradients has not sent yet. All ranks' debts together are what counts;
so their sum is saved, by parameter, and divided among the ranks that load it, however many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvdtrain.collectives import ops
from hvdtrain.compression.channel import Channel
from hvdtrain.compression.powersgd import PowerSgd
from hvdtrain.torch.buckets import Bucket
from hvdtrain.torch.exchange import Exchange

MEMORIES = ("residual", "velocity")


def gather(exchange: Exchange, exact: bool) -> dict[str, Any]:
    """The state of the memories; all ranks call it, and have the same.

    exact: also each rank's own memories, so that the same number of ranks goes on to the bit; O(ranks x model).
    """
    state: dict[str, Any] = {"steps": exchange.steps, "debts": {}, "bases": {}, "ranks": []}
    for number, bucket in enumerate(exchange.coded):
        channel = bucket.channel
        assert isinstance(channel, Channel)
        for memory in MEMORIES:
            own = getattr(channel, memory)
            if own is not None:
                total = ops.wait(ops.all_reduce_async_(own.clone(), f"memories.{number}.{memory}"))
                if memory == "residual" and channel.owned is not None:
                    owned = ops.wait(ops.all_gather_async(channel.owned, f"memories.{number}.owned"))
                    total += owned[: len(total)]
                state["debts"] |= {f"{name}.{memory}": part for name, part in by_parameter(bucket, total).items()}
        if isinstance(channel.codec, PowerSgd):
            for name, basis in zip(bucket.names, channel.codec.basis, strict=True):
                state["bases"][name] = (channel.codec.left, basis)
    if exact:
        state["ranks"] = gather_exactly(exchange)
    return state


def gather_exactly(exchange: Exchange) -> list[dict[str, Tensor]]:
    """Each rank's memories, bucket by bucket."""
    ranks: list[dict[str, Tensor]] = [{} for _ in range(exchange.size)]
    for number, bucket in enumerate(exchange.coded):
        for memory in (*MEMORIES, "owned"):
            own = getattr(bucket.channel, memory)
            if own is not None:
                gathered = ops.wait(ops.all_gather_async(own, f"memories.{number}.{memory}.exact"))
                for rank, part in enumerate(gathered.view(exchange.size, -1)):
                    ranks[rank][f"{number}.{memory}"] = part
    return ranks


def load(exchange: Exchange, state: dict[str, Any]) -> None:
    """Take over a state: to the bit if it holds as many ranks' memories as there are ranks, else divided among them."""
    exchange.steps = state["steps"]
    exact = len(state["ranks"]) == exchange.size
    for number, bucket in enumerate(exchange.coded):
        channel = bucket.channel
        assert isinstance(channel, Channel)
        for memory in (*MEMORIES, "owned"):
            own = getattr(channel, memory)
            if own is None:
                continue
            saved = state["ranks"][ops.rank()].get(f"{number}.{memory}") if exact else None
            if saved is not None and saved.shape == own.shape:
                own.copy_(saved)
            elif memory != "owned":
                parts = [
                    state["debts"].get(f"{name}.{memory}", torch.zeros(p.numel())).to(own.device)
                    for name, p in zip(bucket.names, bucket.params, strict=True)
                ]
                own.copy_(torch.cat(parts) / exchange.size)
        if isinstance(channel.codec, PowerSgd) and all(name in state["bases"] for name in bucket.names):
            saved_bases = [state["bases"][name] for name in bucket.names]
            channel.codec.left = saved_bases[0][0]
            channel.codec.basis = [basis.to(channel.flat.device) for _, basis in saved_bases]


def by_parameter(bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
    """A flat tensor of a bucket's parameters, cut up by name; each part in the order of its memory."""
    parts = torch.split(flat, [p.numel() for p in bucket.params])
    return {name: part.clone() for name, part in zip(bucket.names, parts, strict=True)}


def scale(exchange: Exchange, factor: float) -> None:
    """Multiply all memories, which are in the gradients' units: when a loss scale changes."""
    for bucket in exchange.coded:
        for memory in (*MEMORIES, "owned"):
            own = getattr(bucket.channel, memory)
            if own is not None:
                own.mul_(factor)
