"""What commands that are one rank among many share: how they begin, and how they end when they fail."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from hvdtrain import messages
from hvdtrain.collectives.world import World, init, local_size_from_environment, rank_from_environment
from hvdtrain.errors import EXIT_FAILED, EXIT_USER, RunError, UserError


def share_cores() -> None:
    """Set OMP_NUM_THREADS, unless it is, to this rank's share of its host's cores: before torch is imported."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // local_size_from_environment())))


def begin() -> World:
    """Start Horovod, and tell the launcher. Raises UserError."""
    world = init()
    messages.send("started", rank=world.rank, host=world.host, pid=os.getpid())
    return world


@contextlib.contextmanager
def leaving_on_failure() -> Iterator[None]:
    """End this rank at once when what is done in here fails."""
    try:
        yield
    except (UserError, RunError) as error:
        leave(EXIT_USER if isinstance(error, UserError) else EXIT_FAILED, str(error), "")
    except KeyboardInterrupt:
        leave(130, "interrupted", "")
    except Exception as error:
        leave(EXIT_FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())


def leave(code: int, error: str, trace: str) -> NoReturn:
    """End this rank at once, saying why; the launcher, or the broken connection, ends the others.

    Not by sys.exit: Horovod's exit handler would wait for the other ranks.
    """
    tell_failure(code, error, trace)
    if not messages.launched():
        rank = rank_from_environment()
        prefix = f"rank {rank} on {socket.gethostname()}: " if rank is not None else ""
        print(f"{trace}hvdtrain: error: {prefix}{error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def tell_failure(code: int, error: str, trace: str) -> None:
    """Tell the launcher, if there is one, that this rank fails."""
    rank, host = rank_from_environment() or 0, socket.gethostname()
    messages.send("failed", rank=rank, host=host, code=code, error=error, traceback=trace)
