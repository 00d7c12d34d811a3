"""The state of a sharded optimizer in checkpoints: by parameter, as without shards, and so on any number of ranks.

It is gathered bucket by bucket into rank 0's host memory. Each rank loads its part of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.comm.uneven import gather_on_root
from hvdtrain.exchange.buckets import view_like
from hvdtrain.torch.encoded_changes import settle_unsent
from hvdtrain.torch.held_parts import is_sized, join_parts
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.local_parts import LocalParts
from hvdtrain.torch.optimizer_methods import read_param_groups
from hvdtrain.torch.piece_owner import PieceOwner, use_pieces
from hvdtrain.torch.pieces import Piece, cut_state
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.tensors import read_tensors, write_tensors

ParameterState = StateDict  # what an optimizer keeps of a parameter, or of a piece of it, by its own names


def gather_whole_state(shards: OptimizerShards) -> dict[nn.Parameter, ParameterState]:
    """Return the state of each parameter on rank 0, in host memory; all ranks call this. Others return nothing."""
    found: dict[nn.Parameter, ParameterState] = {}
    for number, bucket in enumerate(shards.buckets):
        own = [copy_to_host(shards.optimizer.state.get(values, {})) for _, values in bucket.own]
        gathered: dict[nn.Parameter, list[tuple[Piece, ParameterState]]] = {}
        for rank, data in enumerate(gather_on_root(write_tensors(own), f"{shards.name}state.{number}")):
            for piece, state in zip(bucket.list_pieces(rank), read_tensors(data), strict=True):
                gathered.setdefault(piece.param, []).append((piece, state))
        found |= {p: join_states(parts) for p, parts in gathered.items() if parts[0][1]}
    return found


def copy_to_host(state: Mapping[str, Any]) -> ParameterState:
    """Return what is kept of a piece, without other parts of the memory that it is in."""
    return {k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def join_states(parts: Sequence[tuple[Piece, ParameterState]]) -> ParameterState:
    """Return the state of a parameter from those of all of its pieces, in order."""
    (first, state), p = parts[0], parts[0][0].param
    if first.whole:
        return state
    joined = join_parts([(piece.end - piece.start, part) for piece, part in parts])
    return {k: view_like(joined[k], p) if is_sized(v, first.end - first.start) else v for k, v in state.items()}


def make_state_dict(
    optimizer: torch.optim.Optimizer, parts: Collection[nn.Parameter], whole: dict[nn.Parameter, ParameterState]
) -> StateDict:
    """Return an optimizer's state dict with the whole state that was gathered, which is dropped then.

    parts: what has a part of it, and is left out.
    """
    state: Any = optimizer.state
    kept = dict(state)
    try:
        for values in kept.keys() & set(parts):
            del state[values]
        state.update({p: own for p, own in whole.items() if own})
        return optimizer.state_dict()
    finally:
        state.clear()
        state.update(kept)
        whole.clear()


def restore_state_dict(optimizer: torch.optim.Optimizer, shards: PieceOwner | None, whole: StateDict) -> None:
    """Load a state dict of all parameters, of which this rank takes its part if the optimizer is sharded."""
    params = [p for group in read_param_groups(optimizer) for p in group["params"]]
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    encoded = shards.encoded if isinstance(shards, OptimizerShards) else set[nn.Parameter]()
    settle_unsent(dict(zip(numbers, params, strict=False)), whole["state"], encoded)
    if isinstance(shards, OptimizerShards):
        whole = cut_state_dict(shards, whole)
    elif isinstance(shards, LocalParts):
        whole = shards.cut_state_dict(whole)
    with use_pieces(shards):
        optimizer.load_state_dict(whole)


def cut_state_dict(shards: OptimizerShards, whole: StateDict) -> StateDict:
    """Return this rank's part of an optimizer's state dict, whose groups hold pieces.

    Args:
        shards: of the optimizer.
        whole: the state dict of an optimizer that is not sharded, whose parameters are in the same order.
    """
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    params = shards.parameters
    saved = {p: whole["state"].get(number, {}) for number, p in zip(numbers, params, strict=True)}
    places = {values: piece for bucket in shards.buckets for piece, values in bucket.held}
    state: dict[Any, Any] = {key: value for key, value in whole["state"].items() if key not in set(numbers)}
    groups, count = [], 0
    for group, own in zip(whole["param_groups"], shards.groups, strict=True):
        pieces = [values for p in own for values in shards.pieces.get(p, [p])]
        for number, values in enumerate(pieces, count):
            if values in places and (kept := saved[places[values].param]):
                state[number] = {key: cut_state(places[values], value) for key, value in kept.items()}
        groups.append({**group, "params": list(range(count, count + len(pieces)))})
        count += len(pieces)
    return {"state": state, "param_groups": groups}
