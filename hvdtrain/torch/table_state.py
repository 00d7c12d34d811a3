"""Dealt tables in checkpoints: whole, by the names and in the format of a run in which no table is dealt.

They are gathered into rank 0's host memory, a table at a time and some rows of it at a time. Each rank loads its rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from hvdtrain.comm.uneven import gather_on_root
from hvdtrain.system.errors import UserError
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.table_group import Table
from hvdtrain.torch.tensors import read_tensors, write_tensors

BLOCK_BYTES = 2**26  # of a rank's rows of a weight that are gathered at once, with what else there is of them
WEIGHT, AVERAGE = "weight", "average"  # what is gathered of a table besides the optimizer's state
STATE_PREFIX = "state."


@dataclass(frozen=True)
class WholeTable:
    """A table on rank 0, in host memory.

    Attributes:
        weight: (rows, width).
        state: what its optimizer keeps of it.
        average: (rows, width) in the averaged model; None: there is none.
    """

    weight: Tensor
    state: StateDict
    average: Tensor | None


def gather_tables(
    dealt: DealtTables, optimizers: Sequence[torch.optim.Optimizer], average: Mapping[str, nn.Module]
) -> dict[str, WholeTable]:
    """Return the tables by their weights' names on rank 0; all ranks call this. Others return nothing.

    Args:
        dealt: the tables.
        optimizers: of the recipe.
        average: the modules of the averaged model by name; empty: there is none.
    """
    found = {}
    for table, name in enumerate(dealt.names):
        whole = _gather_table(dealt, table, *read_rows(dealt, table, optimizers, average))
        if whole:
            kept = {key.removeprefix(STATE_PREFIX): v for key, v in whole.items() if key.startswith(STATE_PREFIX)}
            found[f"{name}.weight"] = WholeTable(whole[WEIGHT], kept, whole.get(AVERAGE))
    return found


def read_rows(
    dealt: DealtTables, table: int, optimizers: Iterable[torch.optim.Optimizer], average: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], StateDict]:
    """Return what there is of each row of a table that this rank holds, and what its optimizer keeps besides.

    average: the modules of the averaged model by name; empty: there is none.
    """
    module = dealt.modules[table]
    state = next((dict(opt.state[module.weight]) for opt in optimizers if module.weight in opt.state), {})
    held: StateDict = {WEIGHT: module.weight.detach()}
    held |= {STATE_PREFIX + key: value for key, value in state.items()} if len(module.weight) else {}
    if average:
        held[AVERAGE] = cast(Table, average[dealt.names[table]]).weight.detach()
    count = len(module.weight)
    of_rows = {k: v for k, v in held.items() if isinstance(v, Tensor) and v.dim() and len(v) == count}
    return of_rows, {key: value for key, value in held.items() if key not in of_rows}


def _gather_table(dealt: DealtTables, table: int, held: Mapping[str, Tensor], plain: StateDict) -> StateDict:
    """Return all rows of what ranks have of a table, on rank 0; all ranks call this. Arguments as of `read_rows`."""
    numbers, num_ranks = dealt.find_group(table).numbers, dealt.transport.size
    most = max(numbers.count_own(table, rank) for rank in range(num_ranks))
    of_rows = {key: value[: numbers.count_own(table, dealt.rank)] for key, value in held.items()}
    step = max(1, BLOCK_BYTES // max(1, held[WEIGHT].shape[1] * held[WEIGHT].element_size()))
    parts: list[dict[str, list[Tensor]]] = [{} for _ in range(num_ranks)]
    whole: StateDict = {}
    for begin in range(0, most, step):
        rows = {key: value[begin : begin + step].cpu().clone() for key, value in of_rows.items()}
        message = write_tensors([rows, plain if begin == 0 else {}])
        for rank, data in enumerate(gather_on_root(message, f"tables.{table}.{begin}")):
            theirs, others = read_tensors(data, torch.device("cpu"))
            whole |= others
            for key, value in theirs.items():
                parts[rank].setdefault(key, []).append(value)
    for rank, blocks in enumerate(parts):
        place = 0
        joined = {key: torch.cat(values) for key, values in blocks.items()}
        for piece in numbers.own_pieces(table, rank):
            for key, value in joined.items():
                if key not in whole:
                    whole[key] = value.new_empty((dealt.modules[table].num_embeddings, *value.shape[1:]))
                whole[key][piece.begin : piece.end] = value[place : place + piece.end - piece.begin]
            place += piece.end - piece.begin
    return whole


def cut_table_state(dealt: DealtTables, table: int, state: StateDict) -> StateDict:
    """Return this rank's rows of what an optimizer keeps of a table; nothing if it has none."""
    rows, group = dealt.modules[table].num_embeddings, dealt.find_group(table)
    if not group.numbers.held_pieces(table, dealt.rank):
        return {}
    return {
        key: group.cut_rows(table, value) if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for key, value in state.items()
    }


def take_table_rows(dealt: DealtTables | None, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Keep this rank's rows only of tables, if any are dealt, and of the state that optimizers have of them."""
    if dealt is None:
        return
    for optimizer, (table, module) in itertools.product(optimizers, enumerate(dealt.modules)):
        if module.weight in optimizer.state and (
            own := cut_table_state(dealt, table, optimizer.state.pop(module.weight))
        ):
            optimizer.state[module.weight] = own
    dealt.take_rows()


def cut_table_state_dict(dealt: DealtTables, params: Sequence[nn.Parameter], whole: StateDict) -> StateDict:
    """Return an optimizer's state dict with this rank's rows only. params: in the order of its groups."""
    numbers = [number for group in whole["param_groups"] for number in group["params"]]
    tables = {p: table for table, p in enumerate(dealt.parameters.values())}
    state = dict(whole["state"])
    for number, p in zip(numbers, params, strict=False):
        if p in tables and number in state and (own := cut_table_state(dealt, tables[p], state.pop(number))):
            state[number] = own
    return {**whole, "state": state}


def describe_whole(dealt: DealtTables) -> StateDict:
    """Return tensors without memory of the whole tables' shapes and types, by the weights' names."""
    shapes = [(module.num_embeddings, module.embedding_dim) for module in dealt.modules]
    pairs = zip(dealt.parameters.items(), shapes, strict=True)
    return {name: torch.empty(shape, dtype=p.dtype, device="meta") for (name, p), shape in pairs}


def leave_out_rows(dealt: DealtTables | None, state: Mapping[str, object], prefix: str = "") -> StateDict:
    """Return a model's state dict without the tables. prefix: of the names."""
    names = set() if dealt is None else {prefix + name for name in dealt.parameters}
    return {name: value for name, value in state.items() if name not in names}


def cut_weights(dealt: DealtTables, whole: StateDict, prefix: str = "") -> StateDict:
    """Return a model's state dict with this rank's rows of the tables only.

    prefix: of the names. Raises UserError for a table of another size.
    """
    cut = dict(whole)
    for table, name in enumerate(dealt.parameters):
        value, module = whole.get(prefix + name), dealt.modules[table]
        shape = (module.num_embeddings, module.embedding_dim)
        if isinstance(value, Tensor) and value.shape != shape:
            raise UserError(
                f"the checkpoint is of another model or optimizer: size mismatch for {name!r}: {tuple(value.shape)} in "
                f"it, {shape} in this run"
            )
        if isinstance(value, Tensor):
            cut[prefix + name] = dealt.find_group(table).cut_rows(table, value)
    return cut
