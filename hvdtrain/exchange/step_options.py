"""The run options that a framework's step takes, whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from hvdtrain.comm.world import GridShape
from hvdtrain.compression.options import CompressionOptions
from hvdtrain.exchange.model_options import ModelOptions
from hvdtrain.exchange.options import ExchangeOptions
from hvdtrain.exchange.pipeline_options import PipelineOptions
from hvdtrain.exchange.round_options import RoundOptions
from hvdtrain.exchange.server_options import ServerOptions
from hvdtrain.recipe import order
from hvdtrain.recipe.options import OptionValues, option_group
from hvdtrain.recipe.shares import EVEN, Shares
from hvdtrain.recipe.step_options import DataOptions, DeviceOptions, OptimizationOptions
from hvdtrain.system import cpus
from hvdtrain.system.cpus import ThreadCount

Reasons: TypeAlias = dict[str, Literal[False] | str]  # by option, why it is refused; False or "": it is not


def asks_for_grid(given: OptionValues) -> bool:
    """Return whether the given options, by name, divide ranks into replicas (`StepOptions.find_grid_shape`)."""
    return given.get("shard") == "model" or any(given.get(name, 1) != 1 for name in ("stages", "tensor"))


def find_spec_error(spec: str, check: str) -> str:
    """Return why a check of `hvdtrain.compression.spec` refuses a --compression; "" if it does not."""
    from hvdtrain.compression import spec as specs  # with which torch comes

    try:
        getattr(specs, check)(specs.parse_compression(spec))
    except ValueError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class PassSizes:
    """Most examples that a rank scores in one pass."""

    training: int
    evaluation: int


@dataclass(kw_only=True)
class StepOptions:
    """Groups of run options, each defined by the component that acts on it. `RunOptions` adds those of the trainer."""

    data: DataOptions = option_group(DataOptions, "Data")
    optimization: OptimizationOptions = option_group(OptimizationOptions, "Optimization")
    compression: CompressionOptions = option_group(CompressionOptions, "Gradient exchange")
    exchange: ExchangeOptions = option_group(ExchangeOptions, "Gradient exchange")
    model: ModelOptions = option_group(ModelOptions, "Model parallelism")
    rounds: RoundOptions = option_group(RoundOptions, "Local steps")
    pipeline: PipelineOptions = option_group(PipelineOptions, "Model parallelism")
    service: ServerOptions = option_group(ServerOptions, "Parameter server")
    device: DeviceOptions = option_group(DeviceOptions, "Device")

    def __post_init__(self) -> None:
        if self.optimization.scale_lr != "none" and self.data.batch_per_rank is None:
            raise ValueError(
                f"--scale-lr {self.optimization.scale_lr} needs --batch-per-rank; with a fixed --batch-size there is "
                "nothing to scale"
            )
        if self.model.shard_ranks and self.exchange.shard != "model":
            raise ValueError(f"--shard-ranks {self.model.shard_ranks} without --shard model: add it, or leave it out")
        for flag, reasons in self._list_refused().items():
            for option, reason in reasons.items():
                if reason:
                    raise ValueError(f"{flag} with {option}: {reason}{'' if ';' in reason else '; leave one out'}")

    @property
    def model_flag(self) -> str:
        """The option that divides layers or parameters among ranks: "--tensor 2"; "" if none does."""
        if self.model.tensor > 1:
            return f"--tensor {self.model.tensor}"
        return "--shard model" if self.exchange.shard == "model" else ""

    def _list_refused(self) -> dict[str, Reasons]:
        """Return, of each given option that does not go with all others, what it is refused with."""
        exchange, optimization, spec = self.exchange, self.optimization, self.compression.spec
        refused: dict[str, Reasons] = {}
        if optimization.prune is not None:
            refused[f"--prune {optimization.prune}"] = self._refuse_with_pruning()
        if exchange.deterministic:
            refused["--deterministic"] = self._refuse_with_deterministic()
        if exchange.shards_optimizer and spec != "none":
            mirrors = "mirrors do not encode" if exchange.is_mirrored else ""
            refused["--mirror 1"] = {f"--compression {spec}": mirrors}
            refused["--shard optimizer"] = {f"--compression {spec}": find_spec_error(spec, "check_scatters")}
        if exchange.sums_on_hosts:
            grid = self.find_grid_shape(1).flags
            refused["--hierarchy host"] = {
                grid: grid and "ranks of a host are then of one replica",
                f"--compression {spec}": find_spec_error(spec, "check_sums_on_hosts"),
            }
        if self.rounds.local_steps is not None:
            refused[f"--local-steps {self.rounds.local_steps}"] = self._refuse_with_local_steps()
        if self.model_flag:
            refused[self.model_flag] = self._refuse_with_divided_model()
        if self.pipeline.stages > 1:
            refused[self.pipeline.flag] = self._refuse_with_stages()
        if self.service.server is not None:
            refused[f"--server {self.service.server}"] = self._refuse_with_server()
        return refused

    def _refuse_with_divided_model(self) -> Reasons:
        exchange, optimization, local_steps = self.exchange, self.optimization, self.rounds.local_steps
        both = self.model.tensor > 1 and exchange.shard != "none"
        return {
            f"--shard {exchange.shard}": both and "ranks divide the model already",
            "--deterministic": exchange.deterministic and "its sums depend on how ranks divide the model",
            f"--exchange {exchange.kind}": exchange.kind != "bucketed" and "it takes whole parameters",
            "--checkpoint-residuals exact": exchange.saves_rank_residuals and "they are of whole parameters; use sum",
            f"--compression {self.compression.spec}": self._measures_methods
            and "ranks would choose differently; name a method, for example int8",
            "--compile": optimization.compile and "a divided model is not compiled",
            "--sync-batchnorm": optimization.sync_batchnorm and "it would see parts of the batch; use GroupNorm",
            f"--prune {optimization.prune}": optimization.prune is not None and "it ranks whole weights",
            f"--local-steps {local_steps}": local_steps is not None and "its ranks need each other in each step",
            f"--shares {self.data.shares}": self.data.shares != EVEN and "ranks of a replica are equally fast",
        }

    def _refuse_with_stages(self) -> Reasons:
        optimization, exchange, local_steps = self.optimization, self.exchange, self.rounds.local_steps
        recomputes = optimization.recompute is not None and self.pipeline.kind == "zerobubble"
        return {
            "--deterministic": exchange.deterministic and "its sums are over examples, each on one rank",
            f"--exchange {exchange.kind}": exchange.kind != "bucketed" and "it would wait for each micro-batch",
            f"--shard {exchange.shard}": exchange.shard != "none" and "stages divide the optimizer's state already",
            f"--tensor {self.model.tensor}": self.model.tensor > 1 and "ranks divide the model already",
            "--checkpoint-residuals exact": exchange.saves_rank_residuals and "checkpoints are for any layout; use sum",
            f"--local-steps {local_steps}": local_steps is not None
            and "stages of a replica would end rounds differently",
            f"--prune {optimization.prune}": optimization.prune is not None and "it compares weights of all layers",
            "--amp fp16": optimization.amp == "fp16" and "stages would skip different steps; use bf16",
            "--compile": optimization.compile and "stages are pieces of the model",
            "--sync-batchnorm": optimization.sync_batchnorm and "micro-batches are filled up; use GroupNorm",
            f"--recompute {optimization.recompute}": recomputes
            and "it divides backward passes; use another --pipeline-schedule",
            f"--compression {self.compression.spec}": self._measures_methods
            and "it measures steps of whole models; name a method, for example int8",
            f"--shares {self.data.shares}": self.data.shares != EVEN and "micro-batches have one size",
            "--batch-per-rank": self.data.batch_per_rank is not None and "ranks share a batch; give --batch-size",
        }

    def _refuse_with_pruning(self) -> Reasons:
        exchange, spec = self.exchange, self.compression.spec
        return {
            f"--compression {spec}": spec != "none" and "pruned values do not travel, and codecs take whole layers",
            f"--exchange {exchange.kind}": exchange.kind != "bucketed" and "it sends pruned values",
            "--shard optimizer": exchange.shards_optimizer
            and "parts of buckets would be uneven where weights are pruned",
        }

    def _refuse_with_deterministic(self) -> Reasons:
        optimization, spec = self.optimization, self.compression.spec
        return {
            f"--compression {spec}": spec != "none" and "what it loses depends on the ranks",
            "--batch-per-rank": self.data.batch_per_rank is not None
            and "the batch depends on the ranks; give --batch-size",
            "--sync-batchnorm": optimization.sync_batchnorm and "its sums depend on the ranks; use GroupNorm",
            "--compile": optimization.compile and "what is compiled depends on what a rank sees first",
        }

    def _refuse_with_local_steps(self) -> Reasons:
        exchange, optimization = self.exchange, self.optimization
        return {
            "--deterministic": exchange.deterministic and "the number of ranks is part of the maths of rounds",
            f"--exchange {exchange.kind}": exchange.kind != "bucketed" and "it sends gradients in each step",
            f"--compression {self.compression.spec}": self._measures_methods
            and "it measures steps that exchange gradients; name a method, for example int8",
            "--shard optimizer": exchange.shards_optimizer and "it needs the sum of gradients",
            "--amp fp16": optimization.amp == "fp16" and "each rank would scale its loss differently; use bf16",
            f"--prune {optimization.prune}": optimization.prune is not None and "each rank would choose other weights",
            "--sync-batchnorm": optimization.sync_batchnorm and "it exchanges gradients in each step; use GroupNorm",
        }

    def _refuse_with_server(self) -> Reasons:
        exchange, optimization, data, spec = self.exchange, self.optimization, self.data, self.compression.spec
        several, grid, local_steps = self.service.server != 1, self.find_grid_shape(1).flags, self.rounds.local_steps
        clip_norm, ema = optimization.clip_norm, optimization.ema
        return {
            f"--compression {spec}": spec != "none" and "it compresses all-reduces",
            "--deterministic": exchange.deterministic and "which gradient comes first is part of the maths",
            f"--exchange {exchange.kind}": exchange.kind != "bucketed" and "gradients go to the server",
            f"--shard {exchange.shard}": exchange.shards_optimizer and "several servers have parts as well",
            f"--local-steps {local_steps}": local_steps is not None and "workers have no weights of their own",
            f"--shares {data.shares}": data.shares != EVEN and "fast workers get more examples by themselves",
            f"--batch-per-rank {data.batch_per_rank}": data.batch_per_rank is not None and "give --batch-size",
            "--amp fp16": optimization.amp == "fp16" and "each worker would scale its loss differently; use bf16",
            "--sync-batchnorm": optimization.sync_batchnorm and "workers do not meet in a step; use GroupNorm",
            f"--prune {optimization.prune}": optimization.prune is not None and "gradients travel whole",
            grid: grid and "a server has whole layers",
            "--compile": optimization.compile and "a replay would compile something else",
            f"--clip-norm {clip_norm}": several
            and bool(clip_norm)
            and "no server has the whole gradient; use --server 1",
            f"--ema {ema}": several and ema is not None and "no server has all weights; use --server 1",
        }

    @property
    def _measures_methods(self) -> bool:
        """Whether --compression auto chooses a method by its time."""
        return self.compression.spec.partition(",")[0] == "auto"

    def find_grid_shape(self, local_size: int) -> GridShape:
        """Return how ranks are divided into replicas. local_size: the ranks of a host."""
        if self.pipeline.stages > 1:
            return GridShape(self.pipeline.stages, flags=self.pipeline.flag)
        if self.model.tensor > 1:
            return GridShape(self.model.tensor, built_together=True, flags=self.model_flag)
        if self.exchange.shard == "model":
            ranks = self.model.shard_ranks or local_size
            return GridShape(ranks, same_batch=False, built_together=True, flags=self.model_flag)
        return GridShape()

    def find_pass_sizes(self, batch_size: int, shares: Shares, rank: int | None = None) -> PassSizes:
        """Return the most examples of a pass.

        Args:
            batch_size: the recipe's, used unless --batch-per-rank is given.
            shares: of the ranks.
            rank: whose passes; None: of all ranks.
        """
        ranks = len(shares)
        whole = self.data.batch_per_rank * ranks if self.data.batch_per_rank else batch_size
        most_of_rank = -(-whole // ranks)
        if self.exchange.deterministic:
            most_of_shard = -(-whole // self.exchange.virtual_shards)
            training = min(self.data.micro_batch or most_of_shard, most_of_shard)
            return PassSizes(training, training)
        if self.pipeline.stages > 1:
            size = self.pipeline.choose_micro_batch(self.data.micro_batch, most_of_rank)
            return PassSizes(size, size)
        most_dealt = most_of_rank
        if not order.is_even(shares):
            part = max(shares) if rank is None else shares[rank]
            most_dealt = max(1, -(-whole * part // order.WHOLE_SHARE))
        training, evaluation = (min(self.data.micro_batch or most, most) for most in (most_dealt, most_of_rank))
        return PassSizes(training, evaluation)

    def resolve_threads(self, local_size: int) -> ThreadCount:
        """Return how many threads each of `local_size` ranks on this host uses, and what decided that."""
        if self.device.threads is not None:
            return ThreadCount(self.device.threads, "--threads")
        # Sums within an operation depend on the number of threads.
        return ThreadCount(1, "--deterministic") if self.exchange.deterministic else cpus.choose_threads(local_size)
