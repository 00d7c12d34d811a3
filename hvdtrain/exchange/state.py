"""The exchange's state (residuals, velocities, codec states) for checkpoints, on any number of ranks.

A residual is what a rank's share of the gradients has not sent yet. All ranks' residuals together are what counts; so
their sum is saved, by parameter, and divided among the ranks that load it, however many. With the exact state each
rank's own tensors are saved too, so that the same number of ranks continues to the bit.

A state is a dataclass here and a dict in a checkpoint, whose keys are those of hvdtrain's first format:

    ExchangeState               checkpoint["exchange"]
    steps                       "steps"
    build_orders                "joined" ("order", a single list, in the oldest)
    unsent, velocities          "debts": {"NAME.residual": ..., "NAME.velocity": ...}
    codec_states                "bases"
    rank_tensors                "ranks": [{"BUCKET.residual": ..., ".velocity", ".owned", ".owed", ".parts"}, ...]
    bucket_names                "buckets", only with "ranks"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import StatefulCodec
from hvdtrain.compression.hierarchical_reducer import HierarchicalReducer
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer
from hvdtrain.exchange.buckets import Bucket, make_views, real_numel
from hvdtrain.exchange.layout import BucketLayout
from hvdtrain.exchange.local_tensors import cut_local, gather_whole, is_dtensor, wrap_local

# Tensors of a reducer that outlive a step, and what checkpoints call them.
SAVED_NAMES = {"residual": "residual", "velocity": "velocity", "shard_residual": "owned", "carried_over": "owed"}
RankTensors = dict[str, Tensor]  # a rank's own tensors, by the bucket's number and the saved name: "0.residual"


@dataclass
class ExchangeState:
    """What an exchange needs to continue; tensors are in the order of a parameter's memory, real and flat."""

    steps: int = 0
    build_orders: list[list[str]] = field(default_factory=list)  # of parameters, for each time that buckets were made
    unsent: dict[str, Tensor] = field(default_factory=dict)  # by parameter, (values,): not sent yet
    velocities: dict[str, Tensor] = field(default_factory=dict)  # by parameter, (values,): of momentum correction
    codec_states: dict[str, object] = field(default_factory=dict)  # by parameter: `StatefulCodec.parameter_states`
    rank_tensors: list[RankTensors] = field(default_factory=list)  # of each rank, if the state is exact
    bucket_names: list[list[str]] | None = None  # of the parameters in each bucket, if the state is exact

    def to_checkpoint(self) -> dict[str, object]:
        """Return the state as a checkpoint holds it: tensors and plain values only."""
        residuals = {f"{name}.residual": part for name, part in self.unsent.items()}
        saved: dict[str, object] = {
            "steps": self.steps,
            "joined": self.build_orders,
            "debts": residuals | {f"{name}.velocity": part for name, part in self.velocities.items()},
            "bases": self.codec_states,
            "ranks": self.rank_tensors,
        }
        return saved if self.bucket_names is None else saved | {"buckets": self.bucket_names}

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any]) -> ExchangeState:  # as torch.load returns it
        """Return the state that a checkpoint holds. Raises KeyError if it holds none."""
        state = cls(saved["steps"], saved["joined"] if "joined" in saved else [saved["order"]])
        for key, part in saved["debts"].items():
            name, _, kind = key.rpartition(".")
            (state.velocities if kind == "velocity" else state.unsent)[name] = part
        state.codec_states, state.rank_tensors = saved["bases"], saved["ranks"]
        state.bucket_names = saved.get("buckets")
        return state


def gather_exchange_state(exchange: BucketLayout, exact: bool) -> ExchangeState:
    """Return the state of the exchange, the same on all ranks, all of which call this.

    Args:
        exchange: between two steps.
        exact: also each rank's own tensors, so that the same number of ranks continues to the bit; O(ranks x model).
    """
    # What was carried over from another world, newcomers to this one do not have.
    own_flags = [bucket.reducer.carried_over is not None for bucket in exchange.buckets]
    all_flags = collectives.gather_json(own_flags, "memories.owing", exchange.group)
    for bucket, *flags in zip(exchange.buckets, *all_flags, strict=True):
        if any(flags) and bucket.reducer.carried_over is None:
            bucket.reducer.carried_over = torch.zeros_like(bucket.reducer.flat)

    def sum_over_ranks(own: Tensor, name: str) -> Tensor:
        return collectives.wait(collectives.all_reduce_async_(own.clone(), f"memories.{name}", group=exchange.group))

    state = _build_state(exchange, sum_over_ranks)
    if any(map(is_dtensor, exchange.names)):
        state.unsent = _join_parts(exchange, state.unsent, "residual")
        state.velocities = _join_parts(exchange, state.velocities, "velocity")
    if exact:
        state.bucket_names = [bucket.names for bucket in exchange.buckets]
        state.rank_tensors = _gather_rank_tensors(exchange)
    return state


def local_exchange_state(exchange: BucketLayout) -> ExchangeState:
    """Return this rank's part of the state, without asking the others, some of which may be gone."""
    return _build_state(exchange, lambda own, name: own)


def _build_state(exchange: BucketLayout, reduce: Callable[[Tensor, str], Tensor]) -> ExchangeState:
    """Build the state without `rank_tensors`. reduce: maps a tensor of this rank and its name to what is saved."""
    state = ExchangeState(exchange.steps, exchange.build_orders)
    for number, bucket in enumerate(exchange.buckets):
        reducer = bucket.reducer
        unsent = reducer.total_unsent()
        if unsent is not None:
            state.unsent |= split_by_parameter(bucket, reduce(unsent, f"{number}.residual"))
        if not isinstance(reducer, CompressedReducer):
            continue
        if reducer.velocity is not None:
            state.velocities |= split_by_parameter(bucket, reduce(reducer.velocity, f"{number}.velocity"))
        if isinstance(reducer.codec, StatefulCodec):
            states = zip(bucket.names, bucket.params, reducer.codec.parameter_states(), strict=True)
            # That of a part is of no use for another part, and begins anew.
            state.codec_states |= {name: kept for name, p, kept in states if not is_dtensor(p)}
    return state


def _join_parts(exchange: BucketLayout, parts: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return what the ranks of a replica have of parameters' parts, joined in the order of a whole one's memory.

    All ranks call this.

    Args:
        exchange: whose parameters they are.
        parts: by parameter, in the order of the memory that this rank has of it.
        kind: of the parts, a name.
    """
    found = {name for names in collectives.gather_json(sorted(parts), f"memories.{kind}.names") for name in names}
    joined: dict[str, Tensor] = {}
    for p, name in exchange.names.items():
        if name not in found or not is_dtensor(p):
            joined |= {name: parts[name]} if name in parts else {}
            continue
        own = parts.get(name)  # an uneven part may have been too small for a codec
        own = torch.zeros(real_numel(p), device=p.device) if own is None else own
        whole = gather_whole(wrap_local(make_views(own, [p])[0], p))
        joined[name] = flatten_whole(whole, p)
    return joined


def flatten_whole(whole: Tensor, like: Tensor) -> Tensor:
    """Return (values,) real numbers of a tensor of a DTensor's shape, in the order of a whole one's memory."""
    whole = torch.view_as_real(whole) if whole.is_complex() else whole.unsqueeze(-1)
    flat = torch.empty(whole.numel(), dtype=whole.dtype, device=whole.device)
    view_whole(flat, like).copy_(whole)
    return flat


def view_whole(flat: Tensor, like: Tensor) -> Tensor:
    """Return (values,) of `flatten_whole` in a DTensor's shape and an axis for the parts of complex numbers."""
    width = 2 if like.is_complex() else 1
    return flat.as_strided((*like.shape, width), (*(width * stride for stride in like.stride()), 1))


def cut_saved(flat: Tensor, p: torch.nn.Parameter) -> Tensor:
    """Return this rank's part of what is saved of a parameter, or this part, in the order of the memory that it has."""
    if not is_dtensor(p) or len(flat) == real_numel(p):
        return flat
    whole = view_whole(flat, p)
    own = torch.zeros(real_numel(p), dtype=flat.dtype, device=p.device)
    views = make_views(own, [p])
    views[0].copy_(cut_local(torch.view_as_complex(whole) if p.is_complex() else whole.squeeze(-1), p))
    return own


def _gather_rank_tensors(exchange: BucketLayout) -> list[RankTensors]:
    """Return each rank's tensors, bucket by bucket."""
    ranks: list[RankTensors] = [{} for _ in range(exchange.size)]
    for number, bucket in enumerate(exchange.buckets):
        for attribute, saved_name in SAVED_NAMES.items():
            own = getattr(bucket.reducer, attribute, None)
            if own is not None:
                name = f"{number}.{saved_name}"
                gathered = collectives.wait(collectives.all_gather_async(own, f"memories.{name}.exact", exchange.group))
                for rank, part in enumerate(gathered.view(exchange.size, -1)):
                    ranks[rank][name] = part
        if isinstance(bucket.reducer, HierarchicalReducer):
            for tensors in ranks:
                tensors[f"{number}.parts"] = torch.tensor(bucket.reducer.parts)
    return ranks


def load_exchange_state(exchange: BucketLayout, state: ExchangeState) -> None:
    """Take over a state: to the bit if it holds as many ranks' tensors as there are ranks, else divided among them.

    What a bucket without a residual has unsent is carried over: sent once, in the next step.
    """
    exchange.steps = state.steps
    if not exchange.buckets:
        for order in state.build_orders:
            exchange.build_buckets(order)
        exchange.refresh_layout()
    same_ranks = len(state.rank_tensors) == exchange.size
    own_tensors = state.rank_tensors[collectives.rank(exchange.group)] if same_ranks else {}
    names = state.bucket_names or []
    for number, bucket in enumerate(exchange.buckets):
        reducer = bucket.reducer
        exact = {attribute: own_tensors.get(f"{number}.{saved}") for attribute, saved in SAVED_NAMES.items()}
        is_same = names[number : number + 1] == [bucket.names] and has_same_layout(reducer, exact)
        parts = own_tensors.get(f"{number}.parts", torch.arange(exchange.size)).tolist()
        has_same_parts = not isinstance(reducer, CompressedReducer) or parts == list(reducer.parts)
        if own_tensors and is_same and has_same_parts:
            for attribute, tensor in exact.items():
                if tensor is not None:
                    setattr(reducer, attribute, tensor.to(reducer.flat.device, copy=True))
        else:
            load_local_share(bucket, state, exchange.size)
        load_codec_state(bucket, state)


def load_codec_state(bucket: Bucket, state: ExchangeState) -> None:
    """Give the bucket's codec its state, if it has one."""
    if isinstance(bucket.reducer, CompressedReducer) and isinstance(bucket.reducer.codec, StatefulCodec):
        named = zip(bucket.names, bucket.params, strict=True)
        states = [None if is_dtensor(p) else state.codec_states.get(name) for name, p in named]
        bucket.reducer.codec.load_parameter_states(states)


def restore_local_state(exchange: BucketLayout, state: ExchangeState) -> None:
    """Take back what this rank had not sent in another world, as `local_exchange_state` returned it there."""
    for bucket in exchange.buckets:
        load_local_share(bucket, state, 1)


def has_same_layout(reducer: CompressedReducer | PlainReducer, exact: Mapping[str, Tensor | None]) -> bool:
    """Return whether the reducer has the tensors that were saved, in the same sizes, but for what is carried over."""

    def count_values(tensor: Tensor | None) -> int | None:
        return None if tensor is None else len(tensor)

    return count_values(exact["carried_over"]) in (None, len(reducer.flat)) and all(
        count_values(getattr(reducer, attribute, None)) == count_values(tensor)
        for attribute, tensor in exact.items()
        if attribute != "carried_over"
    )


def load_local_share(bucket: Bucket, state: ExchangeState, num_ranks: int) -> None:
    """Give the bucket a rank's share of the state; what it has no residual for is carried over."""
    reducer = bucket.reducer
    unsent = local_share(bucket, state.unsent, num_ranks)
    if isinstance(reducer, CompressedReducer) and reducer.velocity is not None:
        reducer.velocity.copy_(local_share(bucket, state.velocities, num_ranks))
    if isinstance(reducer, CompressedReducer) and reducer.residual is not None:
        reducer.residual.copy_(unsent)
    elif unsent.any():
        reducer.carried_over = unsent


def local_share(bucket: Bucket, parts: Mapping[str, Tensor], num_ranks: int) -> Tensor:
    """Return (n,) like the bucket's flat tensor: 1 / num_ranks of the parameters' parts, 0 for those without one."""
    flat = torch.zeros_like(bucket.reducer.flat)
    for name, p, part in zip(bucket.names, bucket.params, bucket.split_flat(flat), strict=True):
        if name in parts:
            part.copy_(cut_saved(parts[name], p) / num_ranks)
    return flat


def split_by_parameter(bucket: Bucket, flat: Tensor) -> dict[str, Tensor]:
    """Return copies of the parameters' parts of a flat tensor, each in the order of the parameter's memory."""
    return {name: part.clone() for name, part in zip(bucket.names, bucket.split_flat(flat), strict=True)}


def scale_state(exchange: BucketLayout, factor: float) -> None:
    """Multiply all residuals and velocities, which are in the gradients' units, when a loss scale changes."""
    for bucket in exchange.buckets:
        for attribute in SAVED_NAMES:
            own = getattr(bucket.reducer, attribute, None)
            if own is not None:
                own.mul_(factor)
