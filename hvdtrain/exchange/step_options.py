"""The run options that a framework's step takes, whole."""

from __future__ import annotations

from dataclasses import dataclass

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


def asks_for_grid(given: OptionValues) -> bool:
    """Return whether the given options, by name, divide ranks into replicas (`StepOptions.find_grid_shape`)."""
    return given.get("shard") == "model" or any(given.get(name, 1) != 1 for name in ("stages", "tensor"))


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
        if self.optimization.prune is not None:
            self._check_pruning(f"--prune {self.optimization.prune}")
        if self.exchange.deterministic:
            self._check_deterministic()
        if self.exchange.shards_optimizer and self.compression.spec != "none":
            self._check_sharded_compression()
        if self.exchange.sums_on_hosts:
            self._check_hierarchy()
        if self.rounds.local_steps is not None:
            self._check_local_steps()
        if self.model.shard_ranks and self.exchange.shard != "model":
            raise ValueError(f"--shard-ranks {self.model.shard_ranks} without --shard model: add it, or leave it out")
        if self.model_flag:
            self._check_divided_model(self.model_flag)
        if self.pipeline.stages > 1:
            self._check_stages()
        if self.service.server is not None:
            self._check_server(f"--server {self.service.server}")

    @property
    def model_flag(self) -> str:
        """The option that divides layers or parameters among ranks: "--tensor 2"; "" if none does."""
        if self.model.tensor > 1:
            return f"--tensor {self.model.tensor}"
        return "--shard model" if self.exchange.shard == "model" else ""

    def _check_divided_model(self, flag: str) -> None:
        exchange, compression = self.exchange, self.compression.spec
        if self.model.tensor > 1 and exchange.shard != "none":
            raise ValueError(f"{flag} with --shard {exchange.shard}: ranks divide the model already; leave one out")
        if exchange.deterministic:
            raise ValueError(f"{flag} with --deterministic: its sums depend on how ranks divide the model")
        if exchange.kind != "bucketed":
            raise ValueError(f"{flag} with --exchange {exchange.kind}, which takes whole parameters: leave it out")
        if exchange.saves_rank_residuals:
            raise ValueError(f"{flag} with --checkpoint-residuals exact: they are saved by whole parameters; use sum")
        if compression.partition(",")[0] == "auto":
            raise ValueError(
                f"{flag} with --compression auto: ranks would choose differently; name a method, e.g. int8"
            )
        if self.optimization.compile:
            raise ValueError(f"{flag} with --compile: a divided model is not compiled; leave it out")
        if self.optimization.sync_batchnorm:
            raise ValueError(f"{flag} with --sync-batchnorm: batch norm would see parts of the batch; use GroupNorm")
        if self.optimization.prune is not None:
            raise ValueError(f"{flag} with --prune {self.optimization.prune}: it ranks whole weights; leave one out")
        if self.rounds.local_steps is not None:
            raise ValueError(f"{flag} with --local-steps: ranks that divide a model need each other in each step")
        if self.data.shares != "even":
            raise ValueError(f"{flag} with --shares {self.data.shares}: ranks that divide a model are equally fast")

    def _check_stages(self) -> None:
        """Raise ValueError for options that are not exact with stages, or make no sense."""
        optimization, exchange, flag = self.optimization, self.exchange, self.pipeline.flag
        method = self.compression.spec.partition(",")[0]
        refused = {
            "--deterministic": (exchange.deterministic, "its sums are over examples, each on one rank"),
            f"--exchange {exchange.kind}": (exchange.kind != "bucketed", "it would wait for each micro-batch"),
            f"--shard {exchange.shard}": (exchange.shard != "none", "stages divide the optimizer's state already"),
            f"--tensor {self.model.tensor}": (self.model.tensor > 1, "ranks divide the model already"),
            "--checkpoint-residuals exact": (exchange.saves_rank_residuals, "checkpoints are for any layout; use sum"),
            f"--local-steps {self.rounds.local_steps}": (
                self.rounds.local_steps is not None,
                "stages of a replica would end rounds differently",
            ),
            f"--prune {optimization.prune}": (optimization.prune is not None, "it compares weights of all layers"),
            "--amp fp16": (optimization.amp == "fp16", "stages would skip different steps; use bf16"),
            "--compile": (optimization.compile, "stages are pieces of the model"),
            "--sync-batchnorm": (optimization.sync_batchnorm, "micro-batches are filled up; use GroupNorm"),
            f"--recompute {optimization.recompute}": (
                optimization.recompute is not None and self.pipeline.kind == "zerobubble",
                "it divides backward passes; use another --pipeline-schedule",
            ),
            f"--compression {self.compression.spec}": (
                method == "auto",
                "it measures steps of whole models; name a method, for example int8",
            ),
            f"--shares {self.data.shares}": (self.data.shares != EVEN, "micro-batches have one size"),
            "--batch-per-rank": (self.data.batch_per_rank is not None, "give --batch-size"),
        }
        for option, (is_given, reason) in refused.items():
            if is_given:
                raise ValueError(f"{flag} with {option}: {reason}; leave out one of them")

    def _check_pruning(self, prune: str) -> None:
        if self.compression.spec != "none":
            raise ValueError(
                f"{prune} with --compression {self.compression.spec}: pruned values do not travel, and codecs take "
                "whole layers; leave out one of them"
            )
        if self.exchange.kind != "bucketed":
            raise ValueError(f"{prune} with --exchange {self.exchange.kind}, which sends pruned values: leave it out")
        if self.exchange.shards_optimizer:
            raise ValueError(
                f"{prune} with --shard optimizer: parts of buckets would be uneven where weights are pruned; leave out "
                "one of them"
            )

    def _check_sharded_compression(self) -> None:
        if self.exchange.is_mirrored:
            raise ValueError(
                f"--mirror 1 with --compression {self.compression.spec}: mirrors do not encode; leave one out"
            )
        from hvdtrain.compression.spec import check_scatters, parse_compression  # with which torch comes

        try:
            check_scatters(parse_compression(self.compression.spec))
        except ValueError as error:
            raise ValueError(f"--shard optimizer with --compression {self.compression.spec}: {error}") from None

    def _check_hierarchy(self) -> None:
        from hvdtrain.compression.spec import check_sums_on_hosts, parse_compression  # with which torch comes

        if shape := self.find_grid_shape(1).flags:
            raise ValueError(f"--hierarchy host with {shape}: ranks of a host are then of one replica; leave one out")
        spec = self.compression.spec
        try:
            check_sums_on_hosts(parse_compression(spec))
        except ValueError as error:
            raise ValueError(f"--hierarchy host with --compression {spec}: {error}") from None

    def _check_deterministic(self) -> None:
        if self.compression.spec != "none":
            raise ValueError(
                f"--deterministic with --compression {self.compression.spec}: what it loses depends on the ranks"
            )
        if self.data.batch_per_rank is not None:
            raise ValueError("--deterministic with --batch-per-rank: the batch depends on the ranks; give --batch-size")
        if self.optimization.sync_batchnorm:
            raise ValueError("--deterministic with --sync-batchnorm: its sums depend on the ranks; use GroupNorm")
        if self.optimization.compile:
            raise ValueError("--deterministic with --compile: what is compiled depends on what a rank sees first")

    def _check_local_steps(self) -> None:
        if self.exchange.deterministic:
            raise ValueError("--local-steps with --deterministic: the number of ranks is part of the maths of rounds")
        if self.exchange.kind != "bucketed":
            raise ValueError(f"--local-steps with --exchange {self.exchange.kind}: leave --exchange out")
        if self.compression.spec.partition(",")[0] == "auto":
            raise ValueError(
                "--local-steps with --compression auto, which measures steps that exchange gradients: name a method, "
                "for example int8"
            )
        if self.exchange.shards_optimizer:
            raise ValueError("--local-steps with --shard optimizer, which needs the sum of gradients: leave one out")
        if self.optimization.amp == "fp16":
            raise ValueError("--local-steps with --amp fp16: each rank would scale its loss differently; use bf16")
        if self.optimization.prune is not None:
            raise ValueError(
                f"--local-steps with --prune {self.optimization.prune}: each rank would choose other weights; "
                "leave one out"
            )
        if self.optimization.sync_batchnorm:
            raise ValueError("--local-steps with --sync-batchnorm: it exchanges gradients in each step; use GroupNorm")

    def _check_server(self, flag: str) -> None:
        several, grid = self.service.server != 1, self.find_grid_shape(1).flags
        clip_norm, prune, ema = self.optimization.clip_norm, self.optimization.prune, self.optimization.ema
        refused = {
            f"--compression {self.compression.spec}: it compresses all-reduces": self.compression.spec != "none",
            "--deterministic: which gradient comes first is part of the maths": self.exchange.deterministic,
            f"--exchange {self.exchange.kind}: gradients go to the server": self.exchange.kind != "bucketed",
            f"--shard {self.exchange.shard}: several servers have parts as well": self.exchange.shards_optimizer,
            f"--local-steps {self.rounds.local_steps}: workers have no weights of their own": (
                self.rounds.local_steps is not None
            ),
            f"--shares {self.data.shares}: fast workers get more examples by themselves": self.data.shares != EVEN,
            f"--batch-per-rank {self.data.batch_per_rank}: give --batch-size": self.data.batch_per_rank is not None,
            "--amp fp16: each worker would scale its loss differently; use bf16": self.optimization.amp == "fp16",
            "--sync-batchnorm: workers do not meet in a step; use GroupNorm": self.optimization.sync_batchnorm,
            f"--prune {prune}: gradients travel whole": prune is not None,
            f"{grid}: a server has whole layers": bool(grid),
            "--compile: a replay would compile something else": self.optimization.compile,
            f"--clip-norm {clip_norm}: no server has the whole gradient; use --server 1": several and bool(clip_norm),
            f"--ema {ema}: no server has all weights; use --server 1": several and ema is not None,
        }
        for text, is_given in refused.items():
            if is_given:
                raise ValueError(f"{flag} with {text}{'' if ';' in text else '; leave one out'}")

    def find_grid_shape(self, local_size: int) -> GridShape:
        """Return how ranks are divided into replicas. local_size: the ranks of a host."""
        if self.pipeline.stages > 1:
            return GridShape(self.pipeline.stages, flags=self.pipeline.flag)
        if self.model.tensor > 1:
            return GridShape(self.model.tensor, same_batch=True, flags=self.model_flag)
        if self.exchange.shard == "model":
            ranks = self.model.shard_ranks or local_size
            return GridShape(ranks, same_batch=False, flags=self.model_flag)
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
