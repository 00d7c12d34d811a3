"""This process's place among the ranks, by the names that scripts for horovod.keras use."""

from __future__ import annotations

import os
import sys
from typing import Any

from hvdtrain.bridge.process import XLA_THREADS_VARIABLE, limit_xla_threads
from hvdtrain.comm import world
from hvdtrain.comm.collectives import rank, size
from hvdtrain.comm.horovod import local_rank, local_size
from hvdtrain.comm.world import World
from hvdtrain.system.errors import UserError

__all__ = ["init", "local_rank", "local_size", "rank", "shutdown", "size"]
CALLBACK_THREADS = 2  # of XLA: one waits in a callback for a copy that another one makes


def init(comm: Any = None) -> World:
    """Initialize Horovod and return this process's place; call it before the first tensor is made.

    Args:
        comm: an mpi4py communicator, to train on a part of a larger MPI job; None for all ranks that were launched.

    Raises:
        UserError: JAX was used before, with one thread.
    """
    if jax_has_started():
        check_jax_threads()
    place = world.init(comm)
    limit_xla_threads(max(CALLBACK_THREADS, jax_threads()))
    world.keep_freed_memory()
    return place


def jax_has_started() -> bool:
    """Return whether JAX has made its threads."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(bridge.backends_are_initialized())


def jax_threads() -> int:
    """Return how many threads XLA has or will have."""
    given = os.environ.get(XLA_THREADS_VARIABLE, "")
    return int(given) if given.isascii() and given.isdigit() else len(os.sched_getaffinity(0))


def check_jax_threads() -> None:
    """Raise UserError if XLA has only one thread: a callback would wait for ever for the copy that it should make."""
    if jax_threads() < CALLBACK_THREADS:
        raise UserError(
            "JAX has one thread in this process, where model.fit on several ranks needs two: call hvdtrain.keras.init()"
            f" before anything else uses JAX, or set {XLA_THREADS_VARIABLE}=2"
        )


def shutdown() -> None:
    """Shut Horovod down in this process; collectives of the other ranks then fail, unless they do the same."""
    world.shut_down_horovod()
