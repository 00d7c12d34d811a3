"""The state of a model in stages: gathered, it is that of the whole model, and each rank takes its part of such a one.

So a checkpoint is resumed on any layout. States are dicts as `hvdtrain.torch.state.TrainingState` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.consistency import check_same_tensors
from hvdtrain.torch.groups import get_parameter_names, match_groups
from hvdtrain.torch.hyperparameters import StateDict

AVERAGED = "module."  # before names in the state of an average
OTHER_KEYS = ("n_averaged",)  # in it


@dataclass(frozen=True)
class WholeModel:
    """What a whole model and its optimizer have.

    Attributes:
        tensors: of the model's state, by name and in order, on the meta device.
        groups: the names of the parameters of each group of the optimizer.
        first_names: of each name of a parameter the first one that it has.
    """

    tensors: StateDict
    groups: Sequence[Sequence[str]]
    first_names: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> WholeModel:
        """Describe a model that is whole."""
        tensors = {
            name: torch.empty_like(x, device="meta") if isinstance(x, Tensor) else x
            for name, x in model.state_dict().items()
        }
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
        return cls(tensors, get_parameter_names(optimizer, model), names)

    def name_own(self, model: nn.Module) -> dict[str, str]:
        """Return what a rank's part of the model calls its parameters, by their names in the whole model."""
        return {self.first_names[name]: name for name, _ in model.named_parameters()}


def split_state(state: StateDict, whole: WholeModel, model: nn.Module) -> StateDict:
    """Return a rank's part of a state. model: its part. Raises UserError if the state is of another model."""
    check_same_tensors(whole.tensors, state["model"])
    if "parameters" not in state:
        raise UserError(
            "the checkpoint is of an hvdtrain that saved no names of parameters: resume it without --stages"
        )
    match_groups(state["parameters"], whole.groups)
    keys, own = set(model.state_dict()), whole.name_own(model)
    part = {**state, "model": {name: x for name, x in state["model"].items() if name in keys}}
    part |= split_optimizer(state["optimizer"], state["parameters"], own)
    if "ema" in state:
        part["ema"] = {
            name: x for name, x in state["ema"].items() if name in OTHER_KEYS or name.removeprefix(AVERAGED) in keys
        }
    if "exchange" in state:
        first = {name for name in own if own[name] == name}
        part["exchange"] = split_exchange(state["exchange"], own, first)
    return part


def split_optimizer(optimizer: StateDict, names: Sequence[Sequence[str]], own: Mapping[str, str]) -> StateDict:
    """Return a rank's part of an optimizer's state dict, and the names of its parameters."""
    groups, kept_names = [], []
    numbered: dict[Any, Any] = {}
    all_numbers = {number for group in optimizer["param_groups"] for number in group["params"]}
    count = 0
    for group, of_group in zip(optimizer["param_groups"], names, strict=True):
        kept = [(number, own[name]) for number, name in zip(group["params"], of_group, strict=True) if name in own]
        for place, (number, _) in enumerate(kept, count):
            if number in optimizer["state"]:
                numbered[place] = optimizer["state"][number]
        groups.append({**group, "params": list(range(count, count + len(kept)))})
        kept_names.append([name for _, name in kept])
        count += len(kept)
    others = {key: value for key, value in optimizer["state"].items() if key not in all_numbers}
    return {
        "optimizer": {**optimizer, "state": {**others, **numbered}, "param_groups": groups},
        "parameters": kept_names,
    }


def split_exchange(saved: StateDict, own: Mapping[str, str], counted: set[str]) -> StateDict:
    """Return a rank's part of what an exchange carries. counted: names of which this rank has what is not sent."""
    debts = {}
    for key, value in saved["debts"].items():
        name, _, kind = key.rpartition(".")
        if name in counted:
            debts[f"{own[name]}.{kind}"] = value
    orders = saved["joined"] if "joined" in saved else [saved["order"]]
    return {
        "steps": saved["steps"],
        "joined": [[own[name] for name in order if name in own] for order in orders],
        "debts": debts,
        "bases": {own[name]: value for name, value in saved["bases"].items() if name in own},
        "ranks": [],
    }


def join_stage_states(parts: Sequence[StateDict], whole: WholeModel) -> StateDict:
    """Return the state of the whole model. parts: of the ranks of a replica, in order."""
    joined: StateDict = dict(parts[0])
    found = {name: x for part in reversed(parts) for name, x in part["model"].items()}
    joined["model"] = {name: found[name] for name in whole.tensors}
    joined |= join_optimizers(parts, whole)
    if "ema" in joined:
        averages = {name: x for part in reversed(parts) for name, x in part["ema"].items()}
        order = [*OTHER_KEYS, *(AVERAGED + name for name in whole.tensors)]
        joined["ema"] = {name: averages[name] for name in order if name in averages}
    if any("exchange" in part for part in parts):
        joined["exchange"] = join_exchanges([part["exchange"] for part in parts], whole)
    return joined


def join_optimizers(parts: Sequence[StateDict], whole: WholeModel) -> StateDict:
    """Return the optimizer of the whole model: its state dict, and the names of its parameters."""
    states: StateDict = {}
    for part in reversed(parts):
        optimizer = part["optimizer"]
        for group, names in zip(optimizer["param_groups"], part["parameters"], strict=True):
            for number, name in zip(group["params"], names, strict=True):
                if number in optimizer["state"]:
                    states[whole.first_names[name]] = optimizer["state"][number]
    groups, numbered, count = [], dict[Any, Any](), 0
    for place, names in enumerate(whole.groups):
        # Of a group that is empty on a rank, what it was set to may have been left as it was.
        holder = next((part for part in parts if part["parameters"][place]), parts[0])
        for number, name in enumerate(names, count):
            if name in states:
                numbered[number] = states[name]
        settings = holder["optimizer"]["param_groups"][place]
        groups.append({**settings, "params": list(range(count, count + len(names)))})
        count += len(names)
    first = parts[0]["optimizer"]
    all_numbers = {number for group in first["param_groups"] for number in group["params"]}
    others = {key: value for key, value in first["state"].items() if key not in all_numbers}
    optimizer = {**first, "state": {**others, **numbered}, "param_groups": groups}
    return {"optimizer": optimizer, "parameters": [list(names) for names in whole.groups]}


def join_exchanges(parts: Sequence[StateDict], whole: WholeModel) -> StateDict:
    """Return what the exchanges of all stages carry; what is not sent of a shared parameter is added up."""
    debts: dict[str, Tensor] = {}
    for part in parts:
        for key, value in part["debts"].items():
            name, _, kind = key.rpartition(".")
            key = f"{whole.first_names[name]}.{kind}"
            debts[key] = debts[key] + value if key in debts else value
    length = max(len(part["joined"]) for part in parts)
    orders = []
    for number in range(length):
        names = [whole.first_names[name] for part in parts for name in next(iter(part["joined"][number:]), [])]
        orders.append(list(dict.fromkeys(names)))
    bases = {whole.first_names[name]: value for part in reversed(parts) for name, value in part["bases"].items()}
    return {**parts[0], "joined": orders, "debts": debts, "bases": bases, "ranks": []}
