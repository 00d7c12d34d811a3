"""Prepare a process for JAX or TensorFlow next to torch: threads, GPUs, determinism. Before their first operation."""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

import torch

from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.system.errors import UserError

XLA_THREADS_VARIABLE = "NPROC"
DETERMINISTIC_XLA_FLAG = "--xla_gpu_deterministic_ops=true"
Device = Literal["cpu", "cuda"]


def limit_xla_threads(threads: int) -> None:
    """Limit XLA's pools to this number of threads, whatever cores this process may use.

    They are made by JAX's first operation. Otherwise each rank that is not bound to cores, as under MPI, takes all.
    """
    os.environ[XLA_THREADS_VARIABLE] = str(threads)


def configure_jax(options: StepOptions, world: World) -> Device:
    """Prepare this process's JAX as the run's options say, and return the device that the rank computes on.

    Raises UserError for "cuda" if torch or JAX sees no GPU.
    """
    import jax

    config: Any = jax.config
    limit_xla_threads(options.resolve_threads(world.local_size).count)
    if options.device.device == "cpu" or not has_gpu(options):
        config.update("jax_platforms", "cpu")
        return "cpu"
    # JAX would reserve 75 % of all GPUs' memory, of which torch and NCCL need some.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flags = os.environ.get("XLA_FLAGS", "")
    if options.exchange.deterministic and DETERMINISTIC_XLA_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC_XLA_FLAG}".strip()
    config.update("jax_cuda_visible_devices", str(world.local_rank % torch.cuda.device_count()))
    return choose_foreign_device("JAX", options, world, sees_gpu=jax.default_backend() == "gpu")


def choose_tensorflow_device(options: StepOptions, world: World) -> Device:
    """Return "cpu", the device that a rank computes on with TensorFlow.

    TensorFlow's CUDA 12 and torch's CUDA 13 do not fit into one process.

    Raises UserError for "cuda".
    """
    return choose_foreign_device("TensorFlow", options, world, sees_gpu=False)


def has_gpu(options: StepOptions) -> bool:
    """Return whether torch sees a GPU. Raises UserError if it does not and the run is to use one."""
    if options.device.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; expected cpu")
    return torch.cuda.is_available()


def choose_foreign_device(framework: str, options: StepOptions, world: World, *, sees_gpu: bool) -> Device:
    """Return the device, and print on rank 0 if a GPU stays unused because the framework does not see it.

    Raises UserError if the run is to use one.
    """
    if options.device.device == "cpu" or not has_gpu(options):
        return "cpu"
    if sees_gpu:
        return "cuda"
    remedy = ": pip install 'jax[cuda13]'" if framework == "JAX" else "; the backends jax and torch can"
    if options.device.device == "cuda":
        raise UserError(f"--device cuda, but {framework} cannot use this host's GPU{remedy}; expected cpu")
    if world.rank == 0:
        text = f"{framework} cannot use this host's GPU, this run uses the CPU{remedy}"
        print(f"hvdtrain: warning: {text}", file=sys.stderr, flush=True)
    return "cpu"
