"""Run options that every framework's step acts on: data, optimization and the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvdtrain.recipe.options import option


@dataclass(kw_only=True)
class DataOptions:
    """How much is trained, and how batches are cut, drawn and loaded."""

    steps: int | None = option(None, "train this many steps in all, instead of --epochs", at_least=1)
    patience: int | None = option(
        None, "end the training after this many evaluations without a better value of the recipe's `best`", at_least=1
    )
    batch_per_rank: int | None = option(
        None, "weak scaling: a global batch of this many examples times the ranks", at_least=1
    )
    micro_batch: int | None = option(
        None, "most examples per rank in one pass; a rank's part takes several if larger", at_least=1
    )
    seed: int = option(0, "seed of the weights, the sample order and all other randomness", at_least=0)
    workers: int = option(0, "processes per rank that load data; 0: the rank itself", at_least=0)

    def __post_init__(self) -> None:
        if self.seed >= 1 << 64:
            raise ValueError(f"--seed is {self.seed}; it must be below 2^64")


@dataclass(kw_only=True)
class OptimizationOptions:
    """What is done with the reduced gradients, and in which precision they are computed."""

    scale_lr: Literal["none", "linear", "sqrt"] = option(
        "none", "with --batch-per-rank: multiply lr by the number of ranks, or by its square root"
    )
    clip_norm: float | None = option(None, "clip the norm of the reduced gradient to this", above=0)
    ema: float | None = option(None, "evaluate an exponential moving average of the weights with this decay")
    amp: Literal["off", "bf16", "fp16"] = option("off", "automatic mixed precision")
    sync_batchnorm: bool = option(
        False, "batch norm over the examples of all ranks, as on one rank, instead of over each rank's own"
    )
    compile: bool = option(False, "compile the model (torch.compile)")

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"--ema is {self.ema}; a decay lies between 0 and 1, for example 0.999")


@dataclass(kw_only=True)
class DeviceOptions:
    """What each rank computes on."""

    device: Literal["cpu", "cuda"] | None = option(None, "default: cuda if there is one")
    threads: int | None = option(
        None,
        "CPU threads per rank; default: OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, or the host's cores (a container's CPU "
        "quota), divided among its ranks; with --deterministic 1, and part of the maths",
        at_least=1,
    )
