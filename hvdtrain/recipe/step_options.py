"""Run options that every framework's step acts on: data, optimization and the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hvdtrain.recipe.options import option
from hvdtrain.recipe.pruning import parse_pruning
from hvdtrain.recipe.shares import EVEN, parse_weights
from hvdtrain.system.errors import UserError


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
    shares: str = option(
        EVEN,
        "how the global batch is dealt to the ranks: even, measured (by their speeds, for uneven hosts), or in "
        "proportion to a number for each rank in rank order, as 3:1:1; the maths stays the same",
    )
    seed: int = option(0, "seed of the weights, the sample order and all other randomness", at_least=0)
    workers: int = option(0, "processes per rank that load data; 0: the rank itself", at_least=0)

    def __post_init__(self) -> None:
        if self.seed >= 1 << 64:
            raise ValueError(f"--seed is {self.seed}; it must be below 2^64")
        parse_weights(self.shares)
        if self.shares != EVEN and self.batch_per_rank is not None:
            raise ValueError(
                f"--shares {self.shares} with --batch-per-rank {self.batch_per_rank}: every rank has as many examples; "
                "give --batch-size"
            )


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
    recompute: str | None = option(
        None,
        "save memory: compute activations of the recipe's `blocks` again in the backward pass; all, or every:2 for the "
        "first of each two",
    )
    prune: str | None = option(
        None,
        "set the weights of smallest magnitude to zero, up to a share of all weights and more and more between two "
        "positions, e.g. 0.8,from:2ep,to:10ep; their gradients do not travel",
    )

    def __post_init__(self) -> None:
        if self.prune is not None:
            parse_pruning(self.prune)
        if self.recompute is not None:
            parse_recompute(self.recompute)
            if self.compile:
                raise ValueError(
                    f"--recompute {self.recompute} with --compile: the compiler decides itself what it computes again; "
                    "leave out one of them"
                )
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


def parse_recompute(spec: str) -> int:
    """Return N of "every:N", the first of each N blocks; 1 of "all". Raises UserError for another text."""
    kind, _, number = spec.partition(":")
    if spec == "all":
        return 1
    if kind != "every" or not number.isdecimal() or int(number) < 1:
        raise UserError(f"--recompute {spec}: expected 'all', or 'every:2' for the first of each two blocks")
    return int(number)
