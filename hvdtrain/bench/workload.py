"""What the benchmarks train: a model and one batch on each rank, and steps that are timed in parts."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.comm.horovod import transport_name
from hvdtrain.comm.network_model import synchronize_device
from hvdtrain.comm.world import World
from hvdtrain.recipe.base import Recipe as AnyRecipe
from hvdtrain.recipe.framework import DataSource
from hvdtrain.system.errors import UserError
from hvdtrain.system.text import format_count
from hvdtrain.torch.data import BatchDataset, BatchRequest, seed_all, to_device
from hvdtrain.torch.optimizer import DistributedOptimizer
from hvdtrain.torch.outputs import split_returned
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.scorer import AMP_DTYPES
from hvdtrain.torch.scores import get_numerators
from hvdtrain.torch.setup import choose_device, load_datasets, make_optimizers
from hvdtrain.torch.sources import find_source
from hvdtrain.training.options import RunOptions

WARM_UP_STEPS = 4  # steps that do not count


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random images of random classes."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.randn(3, self.side, self.side), i % 10


@dataclass(kw_only=True)
class ResNet18(Recipe):
    """ResNet-18 on random images."""

    side: int = 64
    lr: float = 0.01

    def model(self) -> nn.Module:
        """Return a network that maps (B, 3, side, side) to (B, 10)."""
        from torchvision.models import resnet18

        model: nn.Module = resnet18(num_classes=10)
        return model

    def dataset(self, split: str) -> Images:
        return Images(self.side)

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, labels = batch
        return {"loss": F.cross_entropy(model(images), labels, reduction="none")}


@dataclass(frozen=True)
class BenchmarkPlan:
    """What a benchmark of steps does.

    Attributes:
        recipe: that is trained.
        options: of the run.
        specs: methods of compression to measure.
        steps: of each method that count.
        json_path: where rank 0 writes the rows; None: nowhere.
    """

    recipe: AnyRecipe
    options: RunOptions
    specs: Sequence[str]
    steps: int
    json_path: Path | None


@dataclass(frozen=True)
class Workload:
    """One rank's part: a model with its first weights, the same on all ranks, and this rank's batch."""

    recipe: Recipe
    model: nn.Module
    batch: Any
    device: torch.device
    amp_dtype: torch.dtype | None
    seed: int
    world: World


@dataclass(frozen=True)
class StepTiming:
    """Seconds of one step.

    Attributes:
        start_time: when it began, by time.perf_counter.
        seconds: of all of it.
        waited_seconds: waiting for communication.
        update_seconds: in the optimizer, after the exchange.
    """

    start_time: float
    seconds: float
    waited_seconds: float
    update_seconds: float


def prepare_workload(plan: BenchmarkPlan, world: World) -> Workload:
    """Build the recipe's model and load this rank's batch.

    Raises:
        UserError: the recipe is for another framework, or its dataset, model or device cannot be used.
    """
    recipe, options = plan.recipe, plan.options
    if not isinstance(recipe, Recipe):
        raise UserError(f"{type(recipe).__name__} is a recipe for {recipe.framework}; expected one for torch")
    torch.set_num_threads(options.resolve_threads(world.local_size).count)
    device = choose_device(options.device.device, world.local_rank)
    data = load_datasets(recipe, world, options.data.seed)["train"]
    if find_source(recipe, data, world) is not DataSource.NUMBERED:
        raise UserError(
            f"{type(recipe).__name__} trains on a {type(data).__name__}: a benchmark needs a list of examples"
        )
    count = options.data.batch_per_rank or max(1, recipe.batch_size // world.size)
    ids = (np.arange(count, dtype=np.int64) * world.size + world.rank) % len(data)
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    loaded = BatchDataset(recipe, "train", data).load_batch(BatchRequest(ids, (options.data.seed,)))[1]
    batch = to_device(loaded, device, memory_format)
    seed_all([options.data.seed])
    model = recipe.model().to(device)
    if recipe.channels_last:
        model = model.to(memory_format=memory_format)
    amp = None if options.optimization.amp == "off" else AMP_DTYPES[options.optimization.amp]
    return Workload(recipe, model, batch, device, amp, options.data.seed, world)


def copy_model(work: Workload) -> nn.Module:
    """Return a copy of the model with its first weights; memory of earlier copies is freed first."""
    gc.collect()
    return copy.deepcopy(work.model).train()


def make_optimizer(work: Workload, model: nn.Module) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for a model. Raises UserError if it has several."""
    optimizers, several = make_optimizers(work.recipe, model)
    if several:
        names = ", ".join(optimizers)
        raise UserError(f"{type(work.recipe).__name__} has an optimizer for each of {names}; expected one to measure")
    return optimizers["loss"]


def make_distributed_optimizer(
    work: Workload, model: nn.Module, compression: str = "none", exchange: Literal["bucketed", "horovod"] = "bucketed"
) -> Any:
    """Return the recipe's optimizer for a model, with an exchange of gradients."""
    inner = make_optimizer(work, model)
    held = {p for group in inner.param_groups for p in group["params"]}
    named = [(name, p) for name, p in model.named_parameters() if p in held]
    return DistributedOptimizer(inner, named, compression=compression, exchange=exchange, seed=work.seed)


def compute_gradients(work: Workload, model: nn.Module, optimizer: Any) -> None:
    """Compute the gradients of the mean loss of this rank's batch."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(work.device.type, work.amp_dtype, enabled=work.amp_dtype is not None):
        loss = get_numerators(split_returned(work.recipe.score(model, work.batch))[0]["loss"])
    loss.float().mean().backward()  # type: ignore[no-untyped-call]


def time_step(work: Workload, model: nn.Module, optimizer: Any) -> StepTiming:
    """Make and time one step; gradients are exchanged if the optimizer is a distributed one."""
    begin = time.perf_counter()
    compute_gradients(work, model, optimizer)
    waited = 0.0
    if hasattr(optimizer, "synchronize"):
        optimizer.synchronize()
        waited = optimizer.waited
    synchronize_device(work.device)
    exchanged = time.perf_counter()
    optimizer.step()
    synchronize_device(work.device)
    end = time.perf_counter()
    return StepTiming(begin, end - begin, waited, end - exchanged)


def max_over_ranks(name: str, values: list[float]) -> list[float]:
    """Return the maximum of each value over the ranks, on all ranks."""
    return [max(column) for column in zip(*collectives.gather_json(values, name), strict=True)]


def slowest_rank_medians(name: str, steps: list[StepTiming]) -> tuple[float, float, float]:
    """Return the slowest rank's median seconds, seconds waited and seconds of the update, on all ranks."""
    columns = [[s.seconds for s in steps], [s.waited_seconds for s in steps], [s.update_seconds for s in steps]]
    seconds, waited, update = max_over_ranks(name, [statistics.median(column) for column in columns])
    return seconds, waited, update


def print_on_root(world: World, text: str) -> None:
    """Print a line on rank 0."""
    if world.rank == 0:
        print(text, flush=True)


def describe_world(world: World, device: torch.device) -> str:
    """Return where this runs: `2 ranks on 1 host, cpu over gloo`."""
    hosts = len(set(collectives.gather_json(world.host, "bench.hosts")))
    where = f"{format_count(world.size, 'rank')} on {format_count(hosts, 'host')}"
    return f"{where}, {device.type} over {transport_name(device.type)}"
