"""What of a torch recipe has to be the same on all ranks, in parts that `hvdtrain.comm.agreement` compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import ConsistentPart, check_agreement
from hvdtrain.exchange.local_tensors import local_tensor
from hvdtrain.recipe.framework import Split
from hvdtrain.recipe.metrics import ScoreLayout
from hvdtrain.system.errors import UserError
from hvdtrain.torch.data import BatchDataset
from hvdtrain.torch.example_digest import digest_example
from hvdtrain.torch.hyperparameters import StateDict, get_hyperparameters
from hvdtrain.torch.splits import SplitLoaders


def describe_tensor(tensor: torch.Tensor) -> str:
    """Return the shape and type of a tensor: `(4, 1) float32`."""
    if is_lazy(tensor):
        return f"not initialized, {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def model_parts(model: nn.Module) -> list[ConsistentPart]:
    """Return the parameters and buffers of a model in order: name, shape, dtype, and whether a parameter is trained."""
    parameters = {
        f"parameter {place}": f"{name!r} {describe_tensor(p)}{'' if p.requires_grad else ', frozen'}"
        for place, (name, p) in enumerate(model.named_parameters(), 1)
    }
    buffers = {
        f"buffer {place}": f"{name!r} {describe_tensor(b)}" for place, (name, b) in enumerate(model.named_buffers(), 1)
    }
    difference = "{who}: {key} is {here}, {base} has {there}"
    return [
        ConsistentPart("parameters", parameters, difference),
        ConsistentPart("buffers", buffers, difference),
    ]


def check_same_model(model: nn.Module, saved: StateDict, *, is_part: bool = False) -> None:
    """Raise UserError, naming the first, if parameters or buffers of a checkpoint have other names or shapes.

    is_part: it has parts of them, as this rank has of the model.
    """
    now = model.state_dict()
    check_same_tensors({name: local_tensor(x) for name, x in now.items()} if is_part else now, saved)


def check_same_tensors(model_state: StateDict, saved: StateDict) -> None:
    """`check_same_model`, of a model's state, whose tensors may be on the meta device."""
    now = {name: value for name, value in model_state.items() if isinstance(value, torch.Tensor)}
    there = {name: value for name, value in saved.items() if isinstance(value, torch.Tensor)}
    for name in [*now, *there]:
        if name not in there:
            text = f"it has no {name!r}, which is {describe_tensor(now[name])} in this run"
        elif name not in now:
            text = f"it has {name!r} {describe_tensor(there[name])}, which this run has not"
        elif now[name].shape != there[name].shape and not is_lazy(now[name]):
            here, saved_one = describe_tensor(now[name]), describe_tensor(there[name])
            text = f"size mismatch for {name!r}: {saved_one} in it, {here} in this run"
        else:
            continue
        raise UserError(f"the checkpoint is of another model or optimizer: {text}")


def optimizers_part(optimizers: Mapping[str, torch.optim.Optimizer], model: nn.Module) -> ConsistentPart:
    """Return each optimizer's class, and of each group its hyperparameters and the names of its parameters."""
    names = {p: name for name, p in model.named_parameters()}
    values = {"the order of the losses": ", ".join(optimizers)} if len(optimizers) > 1 else {}
    for loss, optimizer in optimizers.items():
        which = "the optimizer" if len(optimizers) == 1 else f"the optimizer of {loss!r}"
        values[which] = type(optimizer).__name__
        hyperparameters = get_hyperparameters(optimizer.param_groups)
        for place, (group, given) in enumerate(zip(optimizer.param_groups, hyperparameters, strict=True), 1):
            for name, value in given.items():
                values[f"{name} of {which}'s group {place}"] = repr(value)
            own = [names.get(p, "not of the model") for p in group["params"]]
            values |= {f"parameter {i} of {which}'s group {place}": name for i, name in enumerate(own, 1)}
    return ConsistentPart("optimizer", values, "{who}: {key} is {here}, {base} has {there}")


@dataclasses.dataclass(frozen=True)
class SeededExamples:
    """A split's examples, each with its randomness seeded."""

    compared: Sequence[int]  # ids of those whose content is compared
    load_example: Callable[[int], Any]
    count: int = 0


def get_seeded_examples(splits: SplitLoaders) -> dict[Split, SeededExamples]:
    """Return the examples of each split as the first epoch draws them."""

    def wrap_examples(examples: BatchDataset) -> SeededExamples:
        return SeededExamples(
            examples.list_compared_ids(), lambda i: examples.load_example(i, [splits.seed, 0]), len(examples)
        )

    return {split: wrap_examples(loader.examples) for split, loader in splits.loaders.items()}


def examples_part(getters: Mapping[Split, SeededExamples]) -> ConsistentPart:
    """Return the digests of three examples of each split."""

    def compute_digests() -> dict[str, str]:
        found = {}
        for split, getter in getters.items():
            for i in getter.compared:
                found[f"dataset({split!r})[{i}]"] = digest_example(getter.load_example(i))
        return found

    difference = "{who}: {key} differs from {base}'s (file order? sort the list of files)"
    return ConsistentPart("examples", compute_digests(), difference, recompute=compute_digests)


def select_split_hashes(examples: ConsistentPart, split: Split) -> dict[str, str]:
    """Return the digests of the examples of one split, by name."""
    return {name: digest for name, digest in examples.values.items() if name.startswith(f"dataset({split!r})")}


def select_examples(parts: Sequence[ConsistentPart]) -> ConsistentPart:
    """Return the part of `step_parts` that holds the examples."""
    return next(part for part in parts if part.name == "examples")


def find_changed_hash(examples: ConsistentPart, earlier: Mapping[str, str]) -> str | None:
    """Return the name of the first example whose digest differs from the earlier one, though it is stable now."""
    if all(examples.values.get(name, digest) == digest for name, digest in earlier.items()):
        return None
    stable = examples.find_stable_values()
    return next((name for name, digest in earlier.items() if stable.get(name, digest) != digest), None)


def lengths_part(counts: Mapping[Split, int]) -> ConsistentPart:
    """Return the number of examples of each split that there is."""
    difference = (
        "the recipe's {key} dataset has {here} examples on {rank} and {there} on {base}: all ranks need the same data "
        "({who})"
    )
    return ConsistentPart("datasets", {repr(split): str(count) for split, count in counts.items()}, difference, "0")


def metrics_part(layout: ScoreLayout, calls: str) -> ConsistentPart:
    """Return the names of the scores, how they are summed, and the collectives that `score` calls."""
    values = {"scores": layout.describe(), "the collectives of score": calls}
    return ConsistentPart("metrics", values, "{who}: {key} are {here}, {base} has {there}")


def step_parts(
    device: torch.device,
    examples: Mapping[Split, SeededExamples],
    model: nn.Module,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> list[ConsistentPart]:
    """Return what has to be the same on all ranks before their training is joined."""
    return [
        ConsistentPart("devices", {"--device": device.type}, "{key} is {here} on {who}, {there} on {base}"),
        lengths_part({split: getter.count for split, getter in examples.items()}),
        examples_part(examples),
        *model_parts(model),
        optimizers_part(optimizers, model),
    ]


def agree_on_parts(
    device: torch.device, splits: SplitLoaders, model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]
) -> list[ConsistentPart]:
    """Return what has to be the same on all ranks, and is. Raises UserError on all ranks for what is not."""
    examples = get_seeded_examples(splits)
    parts = collectives.on_all_ranks("agreement.parts", lambda: step_parts(device, examples, model, optimizers))
    check_agreement("agreement.step", parts)
    return parts
