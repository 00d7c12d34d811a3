"""The exchange's memories (residuals, velocities, low-rank bases) as a state, on any number of ranks.

A residual is a debt: what a rank's share of the gradients has not sent yet. All ranks' debts together are what counts;
so their sum is saved, by parameter, and divided among the ranks that load it, however many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.powersgd import PowerSgd
from hvdtrain.compression.reducer import CompressedReducer, PlainReducer
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.buckets import Bucket

MEMORY_NAMES = ("residual", "velocity", "owned", "owed")


def gather_exchange_state(exchange: BucketedExchange, exact: bool) -> dict[str, Any]:
    """The state of the exchange; all ranks call it, and have the same.

    exact: also each rank's own memories, so that the same number of ranks goes on to the bit; O(ranks x model).
    """
    # What was owed in another world, newcomers to this one do not owe.
    owing = [bucket.reducer.owed is not None for bucket in exchange.buckets]
    for bucket, *owes in zip(
        exchange.buckets, *collectives.gather_json(owing, "memories.owing", exchange.group), strict=True
    ):
        if any(owes) and bucket.reducer.owed is None:
            bucket.reducer.owed = torch.zeros_like(bucket.reducer.flat)

    def sum_over_ranks(own: Tensor, name: str) -> Tensor:
        return collectives.wait(collectives.all_reduce_async_(own.clone(), f"memories.{name}", group=exchange.group))

    state = build_exchange_state(exchange, sum_over_ranks)
    if exact:
        state["buckets"] = [bucket.names for bucket in exchange.buckets]
        state["ranks"] = gather_rank_memories(exchange)
    return state


def local_exchange_state(exchange: BucketedExchange) -> dict[str, Any]:
    """This rank's part of the state, without asking the others, some of which may be gone."""
    return build_exchange_state(exchange, lambda own, name: own)


def build_exchange_state(exchange: BucketedExchange, of_all: Callable[[Tensor, str], Tensor]) -> dict[str, Any]:
    """The state but for what is exact; of_all: a memory of this rank, by name, as it is to stand there."""
    state: dict[str, Any] = {
        "steps": exchange.steps,
        "joined": exchange.build_orders,
        "debts": {},
        "bases": {},
        "ranks": [],
    }
    for number, bucket in enumerate(exchange.buckets):
        channel = bucket.reducer
        velocity = channel.velocity if isinstance(channel, CompressedReducer) else None
        for memory, held in (("residual", channel.total_unsent()), ("velocity", velocity)):
            if held is not None:
                parts = split_by_parameter(bucket, of_all(held, f"{number}.{memory}"))
                state["debts"] |= {f"{name}.{memory}": part for name, part in parts.items()}
        if isinstance(channel, CompressedReducer) and isinstance(channel.codec, PowerSgd):
            for name, basis in zip(bucket.names, channel.codec.bases, strict=True):
                state["bases"][name] = (channel.codec.sends_left, basis.clone())
    return state


def restore_local_memories(exchange: BucketedExchange, state: dict[str, Any]) -> None:
    """Take back this rank's own debts, in another world than the one in which `own` found them."""
    for bucket in exchange.buckets:
        load_share(bucket, state["debts"], 1)


def gather_rank_memories(exchange: BucketedExchange) -> list[dict[str, Tensor]]:
    """Each rank's memories, bucket by bucket."""
    ranks: list[dict[str, Tensor]] = [{} for _ in range(exchange.size)]
    for number, bucket in enumerate(exchange.buckets):
        for memory in MEMORY_NAMES:
            own = getattr(bucket.reducer, memory, None)
            if own is not None:
                name = f"memories.{number}.{memory}.exact"
                gathered = collectives.wait(collectives.all_gather_async(own, name, exchange.group))
                for rank, part in enumerate(gathered.view(exchange.size, -1)):
                    ranks[rank][f"{number}.{memory}"] = part
    return ranks


def load_exchange_state(exchange: BucketedExchange, state: dict[str, Any]) -> None:
    """Take over a state: to the bit if it holds as many ranks' memories as there are ranks, else divided among them.

    What was owed by a bucket that has no memory now is sent once, in the next step.
    """
    exchange.steps = state["steps"]
    if not exchange.buckets:
        for order in state.get("joined") or [state["order"]]:  # an earlier hvdtrain made all buckets at once
            exchange.build_buckets(order)
        exchange.refresh_layout()
    same_ranks = len(state["ranks"]) == exchange.size
    own_state = state["ranks"][collectives.rank(exchange.group)] if same_ranks else {}
    names = state.get("buckets", [])  # of the parameters in each, when it was saved
    for number, bucket in enumerate(exchange.buckets):
        channel = bucket.reducer
        exact = {memory: own_state.get(f"{number}.{memory}") for memory in MEMORY_NAMES}
        if own_state and names[number : number + 1] == [bucket.names] and has_same_layout(channel, exact):
            for memory, saved in exact.items():
                if saved is not None:
                    setattr(channel, memory, saved.to(channel.flat.device, copy=True))
        else:
            load_share(bucket, state["debts"], exchange.size)
        if isinstance(channel, CompressedReducer) and isinstance(channel.codec, PowerSgd):
            load_bases(channel.codec, [state["bases"].get(name) for name in bucket.names], channel.flat.device)


def has_same_layout(channel: CompressedReducer | PlainReducer, exact: dict[str, Tensor | None]) -> bool:
    """Whether the channel has the memories that were saved, in the same sizes; it may owe something, or nothing."""

    def memory_length(memory: Tensor | None) -> int | None:
        return None if memory is None else len(memory)

    return memory_length(exact["owed"]) in (None, len(channel.flat)) and all(
        memory_length(getattr(channel, name, None)) == memory_length(exact[name])
        for name in MEMORY_NAMES
        if name != "owed"
    )


def load_bases(codec: PowerSgd, saved: list[tuple[bool, Tensor] | None], device: torch.device) -> None:
    """Take over all matrices' bases; none, if one is missing or of another rank or side."""
    left = saved[0][0] if saved[0] is not None else codec.sends_left
    shapes = [(m if left else n, rank) for (n, m), rank in zip(codec.shapes, codec.matrix_ranks, strict=True)]
    bases = [basis for side, basis in filter(None, saved) if side == left]
    if [tuple(basis.shape) for basis in bases] == shapes:
        codec.sends_left = left
        codec.bases = [basis.to(device) for basis in bases]


def load_share(bucket: Bucket, debts: dict[str, Tensor], ranks: int) -> None:
    """Give the bucket a rank's share of what so many ranks together have; it owes what it has no memory for."""
    channel = bucket.reducer
    debt = local_share(bucket, debts, "residual", ranks)
    if isinstance(channel, CompressedReducer) and channel.velocity is not None:
        channel.velocity.copy_(local_share(bucket, debts, "velocity", ranks))
    if isinstance(channel, CompressedReducer) and channel.residual is not None:
        channel.residual.copy_(debt)
    elif debt.any():
        channel.owed = debt


def local_share(bucket: Bucket, debts: dict[str, Tensor], memory: str, ranks: int) -> Tensor:
    """A rank's share of what so many ranks together have in a memory, shaped as the bucket's flat tensor."""
    flat = torch.zeros_like(bucket.reducer.flat)
    for name, part in zip(bucket.names, bucket.split_flat(flat), strict=True):
        if f"{name}.{memory}" in debts:
            part.copy_(debts[f"{name}.{memory}"] / ranks)
    return flat


def split_by_parameter(bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
    """A flat tensor of a bucket's parameters, cut up by name; each part in the order of its memory."""
    return {name: part.clone() for name, part in zip(bucket.names, bucket.split_flat(flat), strict=True)}


def scale_memories(exchange: BucketedExchange, factor: float) -> None:
    """Multiply all memories, which are in the gradients' units: when a loss scale changes."""
    for bucket in exchange.buckets:
        for memory in MEMORY_NAMES:
            own = getattr(bucket.reducer, memory, None)
            if own is not None:
                own.mul_(factor)
