"""Activation recomputation (--recompute): blocks of a model keep their inputs, and run again in the backward pass.

    forward     x -> block -> y       kept: x, and the states of the random generators
    backward    x -> block again, with those states -> its gradients -> forgotten

Sublinear memory, Chen et al., 2016, arXiv:1604.06174; torch.utils.checkpoint does it. The second time has the same bits
as the first, dropout included, so that gradients are those of a run without it. Only the blocks' `forward` is
replaced: modules, the names of parameters and checkpoints stay as they are.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import CheckpointError, checkpoint, set_checkpoint_early_stop

from hvdtrain.comm import collectives
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.step_options import parse_recompute
from hvdtrain.system.errors import UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.system.text import format_count
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.score_session import get_session
from hvdtrain.torch.sync_batch_norm import SyncBatchNorm
from hvdtrain.torch.tensors import TensorVersion, describe_layer, has_same_bits, read_version

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(eq=False)
class RecomputedForward:
    """What stands for a block's `forward`. A deep copy of the model has its own, which calls the copied block."""

    name: str  # of the block, in the model
    block: nn.Module
    inner: Callable[..., Any]
    is_own: bool  # the block's instance had a forward of its own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block returns. Raises UserError if it changes what a second time would change once more."""
        if not torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
            return self.inner(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [(x, read_version(x)) for x in leaves if isinstance(x, Tensor)]
        first, is_trial = [(args, kwargs)], get_session().is_recording
        returned: list[Tensor] = []  # the first time, in a trial
        buffers = [BufferBefore(name, b, read_version(b), keep_trial_value(b)) for name, b in self._list_buffers()]

        def run(*given: Any) -> Any:
            # Later times have dicts and lists of their own: the model may have put other values into these since.
            is_first = bool(first)
            given_args, given_kwargs = first.pop() if is_first else tree_unflatten(given, structure)
            result = self.inner(*given_args, **given_kwargs)
            if is_trial and is_first:
                returned.extend(x.detach().clone() for x in tree_leaves(result) if isinstance(x, Tensor))
            elif is_trial:
                self._check_same(returned, [x for x in tree_leaves(result) if isinstance(x, Tensor)])
            return result

        # By position: torch looks only at these whether they have changed before the second time.
        with set_checkpoint_early_stop(not is_trial):
            result = checkpoint(run, *leaves, use_reentrant=False, context_fn=keep_random_states)
        if any(read_version(x) != before for x, before in inputs):
            raise UserError(
                f"--recompute: the block {self.name!r} changes its input in place, so that it cannot run again: use "
                "inplace=False in it, or leave it out of blocks()"
            )
        if changed := next((before.name for before in buffers if before.has_changed(self.block)), None):
            raise UserError(
                f"--recompute: {describe_layer(self.block, changed)} in the block {self.name!r} changes its buffer "
                f"{changed!r} in each forward pass, and would do so twice: use GroupNorm or LayerNorm in place of "
                "batch norm, or --sync-batchnorm, or leave the block out of blocks()"
            )
        return result

    def _check_same(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Raise UserError if a block has returned other values the second time, rounding apart."""
        if len(first) != len(second) or not all(map(is_near, first, second)):
            raise UserError(
                f"--recompute: the block {self.name!r} does not return the same the second time (such as one that "
                "counts its calls): leave it out of blocks()"
            )

    def _list_buffers(self) -> list[tuple[str, Tensor]]:
        # hvdtrain's SyncBatchNorm knows what is computed again.
        modules = [(n, m) for n, m in self.block.named_modules() if not isinstance(m, SyncBatchNorm)]
        return [(f"{n}.{key}".lstrip("."), b) for n, m in modules for key, b in m._buffers.items() if b is not None]


@dataclass(frozen=True, eq=False)
class BufferBefore:
    """A buffer before a block's first run; `value` in a trial only, as batch norm's kernels leave no mark."""

    name: str
    tensor: Tensor
    version: TensorVersion
    value: Tensor | None

    def has_changed(self, block: nn.Module) -> bool:
        """Return whether the block has changed the buffer, or bound it to another tensor."""
        owner, _, key = self.name.rpartition(".")
        if block.get_submodule(owner)._buffers.get(key) is not self.tensor:
            return True
        return read_version(self.tensor) != self.version or (
            self.value is not None and not has_same_bits(self.tensor, self.value)
        )


def is_near(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are the same up to the rounding of kernels that add in no fixed order."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if has_same_bits(x, y.detach()) or x.is_sparse or not x.is_floating_point():
        return True
    x, y = x.double(), y.detach().double()
    return bool(torch.allclose(x, y, rtol=0, atol=0.01 * float(x.abs().amax()), equal_nan=True))


def keep_trial_value(b: Tensor) -> Tensor | None:
    """Return a copy of a buffer in the trial before the first step, and nothing afterwards."""
    return b.detach().clone() if get_session().is_recording else None


class RandomStates:
    """Puts numpy's and Python's generators into the states that they are in now, for the time of a `with` block."""

    def __init__(self) -> None:
        self._wanted = np.random.get_state(), random.getstate()

    def __enter__(self) -> None:
        self._before = np.random.get_state(), random.getstate()
        self._set_states(*self._wanted)

    def __exit__(self, *_: object) -> None:
        self._set_states(*self._before)

    @staticmethod
    def _set_states(numpy_state: Any, python_state: Any) -> None:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def keep_random_states() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the contexts of a block's first run and of its second ones; torch keeps the states of its generators."""
    return nullcontext(), RandomStates()


@contextlib.contextmanager
def recompute_blocks(recipe: Recipe, model: nn.Module, options: StepOptions) -> Iterator[list[str]]:
    """Let blocks of a model recompute their activations, as --recompute says, until the end; yield lines to print.

    Raises UserError, on all ranks, for a recipe without `blocks`, and for what it returns if that cannot be recomputed.
    """
    spec = options.optimization.recompute
    if spec is None:
        yield []
        return
    blocks = collectives.on_all_ranks("blocks", lambda: find_blocks(recipe, model, f"--recompute {spec}"))
    chosen = list(blocks.items())[:: parse_recompute(spec)]
    for name, block in chosen:
        block.forward = RecomputedForward(name, block, block.forward, "forward" in vars(block))
    try:
        yield [f"recompute {len(chosen)} of {format_count(len(blocks), 'block')}"]
    finally:
        for _, block in chosen:
            replaced = cast(RecomputedForward, vars(block).pop("forward"))
            if replaced.is_own:
                block.forward = replaced.inner


def find_blocks(recipe: Recipe, model: nn.Module, flag: str) -> dict[str, nn.Module]:
    """Return the recipe's blocks by their names in the model. Raises UserError if there are none.

    flag: the option that needs them.
    """
    if not is_overridden(recipe, "blocks"):
        raise UserError(
            f"{flag}: {type(recipe).__name__} has no method blocks(self, model), which returns the "
            "model's blocks, such as list(model.layers): define it"
        )
    with in_recipe(recipe, "blocks()"):
        blocks = recipe.blocks(model)
    return dict(zip(check_blocks(name_call(recipe, "blocks()"), blocks, model), blocks, strict=True))


def check_blocks(method: str, blocks: object, model: nn.Module, example: str = "list(model.layers)") -> list[str]:
    """Return the blocks' names in the model. Raises UserError unless they are its modules, and none is in another.

    example: of what the method may return.
    """
    if not isinstance(blocks, Sequence) and not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise UserError(f"{method} returned {type(blocks).__name__}; expected a list of modules of the model")
    names = {id(module): name or "the model" for name, module in model.named_modules()}
    seen: dict[int, str] = {}
    for number, block in enumerate(blocks):
        place = f"{method}[{number}]"
        if not isinstance(block, nn.Module) or id(block) not in names:
            raise UserError(
                f"{place} is {block!r:.60}, which is not a module of the model; expected some, such as {example}"
            )
        name = names[id(block)]
        if isinstance(block, torch.jit.ScriptModule):
            raise UserError(f"{place}, {name!r}, is compiled by torch.jit: return modules that are not")
        if type(block).forward is nn.Module.forward and "forward" not in vars(block):
            raise UserError(f"{place}, {name!r}, is a {type(block).__name__}, without a forward: return what is in it")
        if id(block) in seen:
            raise UserError(f"{place}, {name!r}, is there twice: return each block once")
        seen[id(block)] = name
    for block in blocks:
        inner = next(
            (seen[id(module)] for module in block.modules() if module is not block and id(module) in seen), None
        )
        if inner is not None:
            raise UserError(f"{method} has {inner!r}, which is in its block {seen[id(block)]!r}: return one of the two")
    if not seen:
        raise UserError(f"{method} returned no module; expected some, such as {example}")
    return list(seen.values())


def explain_recompute_errors(function: Function) -> Function:
    """Make torch's refusal of a block that computes something else the second time a UserError that says so."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except CheckpointError as error:
            raise UserError(
                "a recomputed block does not do the same the second time (such as count its calls, or read what "
                f"changes in between): leave it out of blocks() ({str(error).strip().splitlines()[0]})"
            ) from error

    return wrapper  # type: ignore[return-value]
