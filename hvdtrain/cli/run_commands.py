"""What `hvdtrain evaluate` and `hvdtrain predict` share: their options, and how this process becomes a rank."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hvdtrain.cli.rank import exit_on_failure, set_rank_threads, start_rank
from hvdtrain.comm.world import World
from hvdtrain.recipe.options import OptionValues
from hvdtrain.system import messages
from hvdtrain.system.errors import UserError
from hvdtrain.training.hang import watch_for_hangs

F = TypeVar("F", bound=Callable[..., Any])
OVERRIDES = ("device", "threads", "workers", "micro_batch")  # run options that these commands take


def add_run_options(command: F) -> F:
    """Add the checkpoint, and the run options that may be others than those of the run."""
    positive = click.IntRange(min=1)
    for option in reversed(
        [
            click.option(
                "--checkpoint",
                default="best",
                show_default=True,
                metavar="best|last|N",
                help="Which checkpoint: the best, the last, or that of step N.",
            ),
            click.option("--micro-batch", type=positive, metavar="N", help="Most examples per rank and pass."),
            click.option("--workers", type=click.IntRange(min=0), metavar="N", help="Loader processes per rank."),
            click.option("--threads", type=positive, metavar="N", help="CPU threads per rank."),
            click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: as in training."),
        ]
    ):
        command = option(command)
    return command


def select_overrides(values: OptionValues) -> OptionValues:
    """Return the run options that were given."""
    return {name: values[name] for name in OVERRIDES if values[name] is not None}


def check_run_dir(run_dir: Path) -> None:
    """Raise UserError if a script was given for the folder of a run."""
    if run_dir.suffix == ".py" and run_dir.is_file():
        raise UserError(
            f"{run_dir} is a file; expected RUN_DIR, the folder of a run; to start a script on each rank: "
            f"hvdtrain launch {shlex.quote(str(run_dir))}"
        )


def run_on_rank(work: Callable[[World], None]) -> int:
    """Start this process as a rank, alone or of a launcher, do the work, and wait for the other ranks.

    Raises UserError in an elastic launch.
    """
    if os.environ.get("HOROVOD_ELASTIC") == "1":
        raise UserError("evaluate and predict do not run on ranks that come and go: leave out the host discovery")
    set_rank_threads()
    with watch_for_hangs(command=True), exit_on_failure():
        world = start_rank()
        work(world)
        from hvdtrain.comm import collectives

        messages.send_message(messages.RankFinished(world.rank, 0))
        collectives.barrier("end")  # launchers end all ranks when one has ended
    return 0
