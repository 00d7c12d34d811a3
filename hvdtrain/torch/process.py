"""Settings of the whole process that a training changes, to be put back after it."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

CUBLAS_WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


def get_random_states() -> tuple[Any, ...]:
    """Return the states of Python's, numpy's and torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def get_determinism() -> tuple[bool, bool]:
    """Return whether torch is to use deterministic algorithms only, and to warn instead of raising an error."""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


@dataclass
class ProcessSettings:
    """What torch, numpy and the environment are set to, from when this is made until `restore`."""

    num_threads: int = field(default_factory=torch.get_num_threads)
    deterministic: tuple[bool, bool] = field(default_factory=get_determinism)
    cudnn_benchmark: bool = field(default_factory=lambda: torch.backends.cudnn.benchmark)
    cudnn_deterministic: bool = field(default_factory=lambda: torch.backends.cudnn.deterministic)
    matmul_precision: str = field(default_factory=torch.get_float32_matmul_precision)
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    cublas_workspace: str | None = field(default_factory=lambda: os.environ.get(CUBLAS_WORKSPACE_VARIABLE))
    rng_states: tuple[Any, ...] = field(default_factory=get_random_states)
    threadpool_limiter: Any = field(default_factory=threadpool_limits)  # limits nothing, and remembers what there is

    def restore_settings(self) -> None:
        """Put all of it back."""
        self.threadpool_limiter.restore_original_limits()
        torch.set_num_threads(self.num_threads)
        if self.deterministic != get_determinism():  # setting it imports torch's compiler: seconds
            mode, warn_only = self.deterministic
            torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        if torch.get_float32_matmul_precision() != self.matmul_precision:
            torch.set_float32_matmul_precision(self.matmul_precision)
        torch.set_default_dtype(self.default_dtype)
        if self.cublas_workspace is None:
            os.environ.pop(CUBLAS_WORKSPACE_VARIABLE, None)
        else:
            os.environ[CUBLAS_WORKSPACE_VARIABLE] = self.cublas_workspace
        python, numpy, cpu, cuda = self.rng_states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
