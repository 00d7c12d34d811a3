"""What commands that are one rank among many share: how they begin, and how they end when they fail."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

from hvdtrain.comm.world import World, init, local_size_from_environment, rank_from_environment
from hvdtrain.elastic.generation import MembershipEnded
from hvdtrain.elastic.membership import FixedMembership, Membership
from hvdtrain.system import cpus, messages
from hvdtrain.system.errors import EXIT_FAILED, KnownError
from hvdtrain.system.exits import stop_descendants
from hvdtrain.system.recipe_errors import recipe_traceback

NOT_ELASTIC = FixedMembership()
ORIGIN_HEAD_START = 1.0  # seconds that other ranks leave the one that failed to print its traceback


def set_rank_threads() -> None:
    """Set OMP_NUM_THREADS, unless it is, to this rank's share of its host's cores: before torch is imported."""
    cpus.set_threads(local_size_from_environment())


def start_rank(membership: Membership = NOT_ELASTIC) -> World:
    """Start Horovod and report this rank to the launcher. Raises UserError.

    A member of an elastic run is alone at first; it is reported when it has joined the others.
    """
    return membership.prepare_process(init())


@contextlib.contextmanager
def exit_on_failure(membership: Membership = NOT_ELASTIC) -> Iterator[None]:
    """End this rank at once if the block fails; also the run, if this is a member of an elastic one."""
    try:
        yield
    except MembershipEnded as gone:
        exit_immediately(gone.exit_code)
    except KnownError as error:
        if membership.has_joined:
            membership.publish_end(error.exit_code, str(error))
        abort_rank(error.exit_code, str(error), error.trace, error.origin)
    except SystemExit as leaving:  # of code that is not one of the recipe's methods: a hook, a library
        abort_rank(EXIT_FAILED, f"sys.exit({leaving.code!r}) was called in the run", recipe_traceback(leaving))
    except KeyboardInterrupt:
        abort_rank(130, "interrupted", "")
    except Exception as error:
        abort_rank(EXIT_FAILED, f"{type(error).__name__}: {error}", traceback.format_exc())


def abort_rank(code: int, error: str, trace: str, origin: int | None = None) -> NoReturn:
    """End this rank at once, reporting why; the launcher, or the broken connection, ends the others.

    origin: the rank on which it happened, if all ranks end with this error; that rank alone prints the traceback.
    """
    report_failure(code, error, trace, origin)
    if not messages.is_launched():
        rank = rank_from_environment()
        prefix = f"rank {rank} on {socket.gethostname()}: " if rank is not None and origin is None else ""
        own = origin in (None, rank or 0)
        print(f"{trace if own else ''}hvdtrain: error: {prefix}{error}", file=sys.stderr, flush=True)
        if not own:
            time.sleep(
                ORIGIN_HEAD_START
            )  # a launcher ends all ranks when one has ended: the traceback must be out by then
    exit_immediately(code)


def exit_immediately(code: int) -> NoReturn:
    """End this process and its children without Horovod's exit handler, which would wait for the other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    stop_descendants()
    os._exit(code)


def report_failure(code: int, error: str, trace: str, origin: int | None = None) -> None:
    """Report to the launcher, if there is one, that this rank fails."""
    rank, host = rank_from_environment() or 0, socket.gethostname()
    messages.send_message(messages.RankFailed(rank, host, os.getpid(), code, error, trace, origin))
