"""The run options that a framework's step takes, whole."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.compression.options import CompressionOptions
from hvdtrain.exchange.options import ExchangeOptions
from hvdtrain.recipe.options import option_group
from hvdtrain.recipe.step_options import DataOptions, DeviceOptions, OptimizationOptions
from hvdtrain.system import cpus
from hvdtrain.system.cpus import ThreadCount


@dataclass(kw_only=True)
class StepOptions:
    """Groups of run options, each defined by the component that acts on it. `RunOptions` adds those of the trainer."""

    data: DataOptions = option_group(DataOptions, "Data")
    optimization: OptimizationOptions = option_group(OptimizationOptions, "Optimization")
    compression: CompressionOptions = option_group(CompressionOptions, "Gradient exchange")
    exchange: ExchangeOptions = option_group(ExchangeOptions, "Gradient exchange")
    device: DeviceOptions = option_group(DeviceOptions, "Device")

    def __post_init__(self) -> None:
        if self.optimization.scale_lr != "none" and self.data.batch_per_rank is None:
            raise ValueError(
                f"--scale-lr {self.optimization.scale_lr} needs --batch-per-rank; with a fixed --batch-size there is "
                "nothing to scale"
            )
        if self.exchange.deterministic:
            self._check_deterministic()

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

    def resolve_threads(self, local_size: int) -> ThreadCount:
        """Return how many threads each of `local_size` ranks on this host uses, and what decided that."""
        if self.device.threads is not None:
            return ThreadCount(self.device.threads, "--threads")
        # Sums within an operation depend on the number of threads.
        return ThreadCount(1, "--deterministic") if self.exchange.deterministic else cpus.choose_threads(local_size)
