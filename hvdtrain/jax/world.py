"""Horovod for JAX loops of one's own: this process's place, and its JAX prepared for it."""

from __future__ import annotations

from typing import Any

from hvdtrain.bridge.process import configure_jax
from hvdtrain.comm import world
from hvdtrain.comm.world import World
from hvdtrain.exchange.step_options import StepOptions


def init(comm: Any = None) -> World:
    """Initialize Horovod, and let JAX use this rank's cores and GPU only; before the first operation of JAX.

    Args:
        comm: an mpi4py communicator, to train on a part of a larger MPI job; None for all ranks that were launched.

    Returns:
        This process's place: rank, size, local_rank, local_size and host.

    Raises:
        UserError, RunError: see `hvdtrain.comm.world.init`.
    """
    place = world.init(comm)
    configure_jax(StepOptions(), place)
    return place
