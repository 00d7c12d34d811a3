"""Before the first step: this rank's device and the recipe's data."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from threadpoolctl import threadpool_limits

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.compression.spec import Spec
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.framework import Split
from hvdtrain.system.errors import RecipeError, RunError, UserError
from hvdtrain.system.recipe_errors import in_recipe, name_call
from hvdtrain.system.turns import hold_host_lock
from hvdtrain.torch.data import check_dataset, seed_all
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.sync_batch_norm import SyncBatchNorm, exclude_from_compiler
from hvdtrain.torch.torch_wrappers import skip_compiler_import

NONDETERMINISTIC_TEXT = " does not have a deterministic implementation"  # torch, of the operation that it names before
Function = TypeVar("Function", bound=Callable[..., Any])


def load_datasets(recipe: Recipe, world: World, seed: int, splits: Sequence[Split] | None = None) -> dict[Split, Any]:
    """Load the recipe's datasets, those that are not None. splits: which; None: all.

    The first rank of each host goes first, so that what it fetches is there for the others. Those of several worlds, as
    processes of an elastic run are at first, take turns by a lock. Before each dataset the generators are seeded with
    the same seed: a random division into two splits is the same for all, on all ranks and after a resume.

    Raises UserError on all ranks if it is raised on one, and for what is not a dataset.
    """
    loaded: dict[Split, Any] = {}

    def load_splits() -> None:
        for split in splits or ("train", *recipe.evals):
            seed_all([seed])
            with in_recipe(recipe, f"dataset({split!r})"):
                dataset = recipe.dataset(split)
            check_dataset(recipe, split, dataset)
            loaded[split] = dataset

    hosts = collectives.gather_json(world.host, "datasets.hosts")
    has_others = collectives.size() == 1 or hosts.count(world.host) < world.local_size
    if hosts.index(world.host) == collectives.rank():
        with lock_data_loading(recipe) if has_others else contextlib.nullcontext():
            collectives.on_all_ranks("datasets.first", load_splits)
        collectives.on_all_ranks("datasets.others", lambda: None)
    else:
        collectives.on_all_ranks("datasets.first", lambda: None)
        collectives.on_all_ranks("datasets.others", load_splits)
    return {split: dataset for split, dataset in loaded.items() if dataset is not None}


def lock_data_loading(recipe: Recipe) -> AbstractContextManager[None]:
    """Return a context that is this process's turn among those of its host that load the recipe's data."""
    name = type(recipe).__name__
    try:
        file = inspect.getfile(type(recipe))
    except (OSError, TypeError):  # such as a class of a notebook
        file = type(recipe).__module__
    source = hashlib.sha256(file.encode()).hexdigest()[:8]
    return hold_host_lock(f"{name}-{source}", f"load the data of {name}")


def make_model(recipe: Recipe) -> torch.nn.Module:
    """Return the recipe's model. Raises UserError if that is something else, RecipeError for what the recipe raises."""
    with in_recipe(recipe, "model()"):
        model = recipe.model()
    if not isinstance(model, torch.nn.Module):
        raise UserError(
            f"{name_call(recipe, 'model()')} returned {type(model).__name__}; expected a torch.nn.Module"
            + (": does it lack a return?" if model is None else "")
        )
    if isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        raise UserError(
            f"{name_call(recipe, 'model()')} returned a {type(model).__name__}; expected the module in it: hvdtrain "
            "trains it on all ranks"
        )
    return model


def build_model(recipe: Recipe, device: torch.device, options: StepOptions) -> torch.nn.Module:
    """Make the recipe's model on all ranks, from the same seed, and move it to the device.

    Raises UserError for a batch norm that is not synchronized as it should be, or cannot be.
    """
    seed_all([options.data.seed])
    model = collectives.on_all_ranks("model", lambda: make_model(recipe)).to(device)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if options.optimization.compile:
        exclude_from_compiler()
    if options.optimization.sync_batchnorm:
        return SyncBatchNorm.convert(model)
    reject_sync_batch_norm(model)
    return model


def reject_sync_batch_norm(model: torch.nn.Module) -> None:
    """Raise UserError for torch's SyncBatchNorm, which exchanges nothing without torch.distributed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            raise UserError(
                f"{name!r} is a torch.nn.SyncBatchNorm, which needs torch.distributed: use "
                "hvdtrain.torch.SyncBatchNorm, or BatchNorm2d with --sync-batchnorm, which makes it one; or GroupNorm"
            )


def make_optimizers(recipe: Recipe, model: torch.nn.Module) -> tuple[dict[str, torch.optim.Optimizer], bool]:
    """Return the recipe's optimizers by the names of their losses, and whether it returned a dict of them.

    Raises UserError if it returned something else, RecipeError for what it raises.
    """
    method = name_call(recipe, "optimizer()")
    with in_recipe(recipe, "optimizer()"):
        returned = _call_optimizer(recipe, model)
    for optimizer in returned.values() if isinstance(returned, dict) else [returned]:
        if hasattr(optimizer, "_requires_update"):
            raise UserError(
                f"{method} returned a DistributedOptimizer; expected the optimizer in it: hvdtrain wraps it"
            )
    if isinstance(returned, torch.optim.Optimizer):
        return {"loss": returned}, False
    if not isinstance(returned, dict) or not returned:
        several = isinstance(returned, (tuple, list, dict))
        raise UserError(
            f"{method} returned {'an empty dict' if returned == {} else type(returned).__name__}; expected a "
            "torch.optim.Optimizer"
            + (": does it lack a return?" if returned is None else "")
            + (", or a dict of them by the names of their losses, e.g. {'loss_d': ..., 'loss_g': ...}" * several)
        )
    for name, optimizer in returned.items():
        if not isinstance(name, str) or not isinstance(optimizer, torch.optim.Optimizer):
            raise UserError(
                f"{method} returned {name!r}: {type(optimizer).__name__} in its dict; expected the name of a score, "
                "and the torch.optim.Optimizer that minimizes it"
            )
    return returned, True


def _call_optimizer(recipe: Recipe, model: torch.nn.Module) -> object:
    """Call `optimizer(params)`, or `optimizer(params, named)` if that is how the recipe declares it."""
    declared = inspect.signature(recipe.optimizer).parameters
    required = [
        p for p in declared.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    method: Callable[..., object] = recipe.optimizer
    params, named = list(model.parameters()), list(model.named_parameters())
    if "named" in declared:
        return method(params, named=named)
    return method(params, named) if len(required) > 1 else method(params)


def configure_torch(options: StepOptions, threads: int) -> None:
    """Prepare this process's torch: its threads, the same bits each time if asked for, no compiler unless asked for."""
    torch.set_num_threads(threads)
    if options.exchange.deterministic:
        enable_determinism(threads)
    if not options.optimization.compile:
        skip_compiler_import()


def enable_determinism(threads: int) -> None:
    """From now on, let the same operations on the same numbers give the same bits in this process.

    Before CUDA starts: cuBLAS reads its workspace's size only once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # numpy's and scikit-learn's threads too, with which a recipe may make its data.
    threadpool_limits(threads)


def explain_nondeterminism(function: Function) -> Function:
    """Make torch's refusal of an operation, once `enable_determinism` was called, a RunError that names it."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, RecipeError) as error:
            cause = error.__cause__ if isinstance(error, RecipeError) else error
            operation, refused, _ = str(cause).partition(NONDETERMINISTIC_TEXT)
            if not refused:
                raise
            text = f"{operation} has no deterministic form in torch on this device: "
            raise RunError(f"{text}use another operation, or leave out --deterministic") from None

    return wrapper  # type: ignore[return-value]


def check_momentum(spec: Spec, optimizer: torch.optim.Optimizer, world: World, options: StepOptions) -> None:
    """Raise UserError if compression's momentum would be a second one, or have no effect."""
    if spec.momentum and options.rounds.local_steps is not None:
        raise UserError(
            f"--local-steps with --compression {spec.text}: its momentum is for gradients, and rounds exchange "
            "changes; use --outer nesterov:0.7,0.9"
        )
    if spec.momentum and any(group.get("momentum") for group in optimizer.param_groups):
        raise UserError(f"compression {spec.text!r}: its momentum replaces the optimizer's: set that to 0")
    if spec.momentum and world.size == 1:
        raise UserError(f"compression {spec.text!r}: its momentum needs two ranks or more; one exchanges nothing")


def choose_device(wanted: str | None, local_rank: int) -> torch.device:
    """Return this rank's device: a host's ranks use its GPUs in turn. Raises UserError for "cuda" without a GPU."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; expected cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
