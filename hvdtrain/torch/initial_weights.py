"""`--init-from`: begin a new run with the weights of a file, or with those of them that fit."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count
from hvdtrain.torch.consistency import describe_tensor
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.loading import select_evaluated_weights
from hvdtrain.torch.safetensors import parse_safetensors
from hvdtrain.torch.table_state import cut_weights, describe_whole
from hvdtrain.torch.tensors import load_module_state, read_tensors, write_tensors

if TYPE_CHECKING:
    from hvdtrain.torch.step import TorchStep

WRAPPER_KEYS = ("model", "state_dict", "model_state_dict")  # under which programs save a model's state
MAX_NAMES_SHOWN = 3  # of each kind that does not fit


def load_initial_weights(step: TorchStep, path: Path, partial: bool) -> list[str]:
    """Load a file's weights on rank 0 and send them to all ranks, which all call this; return lines to print.

    Args:
        step: a new run's, before its first step.
        path: a checkpoint's folder or state, a state dict that torch has saved, or a .safetensors file.
        partial: load what fits, and leave out the rest.

    Raises:
        UserError: on all ranks, if the file cannot be read, or does not fit.
    """
    chosen: dict[str, Tensor] = {}  # on rank 0

    def load_on_root() -> str:
        weights, model = read_weights(path), step.model
        whole = {} if step.tables is None else describe_whole(step.tables)
        fit = match_weights({**model.state_dict(keep_vars=True), **whole}, weights)
        if (fit.problems and not partial) or not fit.chosen:
            others = f"; --init-partial loads the other {len(fit.chosen)}"
            remedy = others if fit.chosen else explain_prefix(model, weights)
            raise UserError(f"--init-from {path} does not fit the model: {fit.describe_problems()}{remedy}")
        chosen.update(fit.chosen)
        if not step.divided.is_divided and step.tables is None:
            load_module_state(model, {**model.state_dict(), **chosen})
        left_out = f"; left out: {fit.describe_problems()}" if fit.problems else ""
        return f"weights   {format_count(len(fit.chosen), 'tensor')} from {path}{left_out}"

    line = collectives.on_root("init_from", load_on_root)
    if step.divided.is_divided or step.tables is not None:  # each rank takes its part
        sent = collectives.broadcast_bytes(write_tensors(chosen) if step.world.rank == 0 else None, "init_from.weights")
        own = read_tensors(sent) if step.tables is None else cut_weights(step.tables, read_tensors(sent))
        load_module_state(step.model, {**step.model.state_dict(), **own})
    else:
        step.divided.broadcast_parameters()
    if step.ema is not None:
        load_module_state(step.ema.module, step.model.state_dict())
    step.changes.accept_loaded_state(step.updater.param_groups)
    return [line]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; of a run with --ema the averaged ones. Raises UserError."""
    if (path / "config.json").is_file():
        raise UserError(f"--init-from {path} is a run folder; name a checkpoint in it: {path / 'checkpoints' / 'best'}")
    file = path / "state" if path.is_dir() else path
    try:
        if file.suffix == ".safetensors":
            return parse_safetensors(file.read_bytes())
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"--init-from {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"--init-from {path} cannot be read: {str(error).splitlines()[0]}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--init-from {path} is not a state dict of tensors alone, as torch.save(model.state_dict(), FILE) writes"
        ) from error
    tensors = find_tensors(loaded)
    if not tensors:
        raise UserError(f"--init-from {path} holds no tensors by name, but {type(loaded).__name__}")
    return tensors


def find_tensors(loaded: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, also of one that is an entry of another dict; {} if there are none."""
    if not isinstance(loaded, Mapping):
        return {}
    if isinstance(loaded.get("model"), Mapping) and "optimizer" in loaded:
        loaded = select_evaluated_weights(dict(loaded))
    found = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    wrapped = next((loaded[key] for key in WRAPPER_KEYS if isinstance(loaded.get(key), Mapping)), None)
    return found or (find_tensors(wrapped) if wrapped is not None else {})


@dataclass(frozen=True)
class WeightsFit:
    """How weights of a file fit a model."""

    chosen: Mapping[str, Tensor]  # to be loaded, by the model's names
    missing: Sequence[str]  # in the file
    extra: Sequence[str]  # in the file
    different: Sequence[str]  # each with both shapes

    @property
    def problems(self) -> bool:
        """Whether something does not fit."""
        return bool(self.missing or self.extra or self.different)

    def describe_problems(self) -> str:
        """Return how many tensors do not fit, and the first few of them."""
        kinds = (("missing", self.missing), ("extra", self.extra), ("of another shape or type", self.different))
        return ", ".join(f"{len(names)} {kind} ({shorten_list(names)})" for kind, names in kinds if names)


def explain_prefix(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Return what to do about a prefix that all names of a file have and the model's have not; "" if that is not it."""
    prefix, own = next(iter(weights)).partition(".")[0] + ".", model.state_dict().keys()
    if not all(name.startswith(prefix) for name in weights) or not any(name[len(prefix) :] in own for name in weights):
        return ""
    wrapper = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}.get(prefix)
    by = f", by {wrapper}" if wrapper else ""
    return f"; its names begin with {prefix!r}{by}: save them without it, {{name.removeprefix({prefix!r}): ...}}"


def shorten_list(names: Sequence[str]) -> str:
    """Return the first few names."""
    more = f" and {len(names) - MAX_NAMES_SHOWN} more" if len(names) > MAX_NAMES_SHOWN else ""
    return f"{', '.join(names[:MAX_NAMES_SHOWN])}{more}"


def match_weights(state: StateDict, weights: Mapping[str, Tensor]) -> WeightsFit:
    """Return which weights fit the tensors of a model's state by name, shape and kind of number.

    A name that the file lacks is not missing if the model has the same tensor under one that is there.
    """
    own = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    there = {id(tensor) for name, tensor in own.items() if name in weights}
    chosen, different = {}, []
    for name, tensor in own.items():
        if name not in weights:
            continue
        value = weights[name]
        if value.shape == tensor.shape and value.is_floating_point() == tensor.is_floating_point():
            chosen[name] = value
        else:
            different.append(f"{name!r}: {describe_tensor(value)} in it, {describe_tensor(tensor)} in the model")
    return WeightsFit(
        chosen=chosen,
        missing=[repr(name) for name, tensor in own.items() if name not in weights and id(tensor) not in there],
        extra=[repr(name) for name in weights if name not in own],
        different=different,
    )
