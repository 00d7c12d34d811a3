"""Settings of the whole process that a training changes, to be put back after it."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def random_states() -> tuple[Any, ...]:
    """The states of Python's, numpy's and torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def deterministic_algorithms() -> tuple[bool, bool]:
    """Whether torch is to use deterministic algorithms only, and to warn instead of raising an error."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@dataclass
class ProcessSettings:
    """What torch, numpy and the environment are set to, from when this is made until `restore`."""

    threads: int = field(default_factory=torch.get_num_threads)
    deterministic: tuple[bool, bool] = field(default_factory=deterministic_algorithms)
    benchmark: bool = field(default_factory=lambda: torch.backends.cudnn.benchmark)
    cudnn_deterministic: bool = field(default_factory=lambda: torch.backends.cudnn.deterministic)
    precision: str = field(default_factory=torch.get_float32_matmul_precision)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    workspace: str | None = field(default_factory=lambda: os.environ.get(WORKSPACE))
    generators: tuple[Any, ...] = field(default_factory=random_states)
    pools: Any = field(default_factory=threadpool_limits)  # limits nothing, and remembers what there is

    def restore(self) -> None:
        """Put all of it back."""
        self.pools.restore_original_limits()
        torch.set_num_threads(self.threads)
        if self.deterministic != deterministic_algorithms():  # setting it imports torch's compiler: seconds
            mode, warn_only = self.deterministic
            torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.backends.cudnn.benchmark = self.benchmark
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        if torch.get_float32_matmul_precision() != self.precision:
            torch.set_float32_matmul_precision(self.precision)
        torch.set_default_dtype(self.dtype)
        if self.workspace is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = self.workspace
        python, numpy, cpu, cuda = self.generators
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
