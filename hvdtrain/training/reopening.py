"""A finished run on ranks of now: what `hvdtrain evaluate` and `hvdtrain predict` have in common.

Rank 0 reads the run folder, and sends config.json, the kept source and the checkpoint to the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.options import OptionValues
from hvdtrain.training import checkpoint
from hvdtrain.training.agreement import agree_on_options
from hvdtrain.training.hang import configure_hang_reporter
from hvdtrain.training.loading import (
    OpenedRun,
    RunFiles,
    find_checkpoint,
    import_run_class,
    open_run,
    read_run_files,
)
from hvdtrain.training.options import RunOptions, make_run_options
from hvdtrain.training.position import Position

# No gradients are exchanged: some of these would be refused on another number of ranks.
UNUSED_VALUES = {
    "compression": "none",
    "exchange": "bucketed",
    "diagnose": False,
    "shares": "even",
    "init_from": None,
    "init_partial": False,
    "stages": 1,
    "pipeline_schedule": None,
}


@dataclass(frozen=True)
class ReopenedRun:
    """A run and one of its checkpoints, the same on all ranks."""

    opened: OpenedRun
    options: RunOptions  # of the run, but for those given now
    position: Position  # of the checkpoint
    state: bytes


def reopen_run(run_dir: Path, which: str, given: OptionValues, world: World) -> ReopenedRun:
    """Read a run's recipe, options and checkpoint on rank 0, and return them on all ranks.

    Args:
        run_dir: the run folder.
        which: the checkpoint: "best", "last" or a step.
        given: run options that replace those of the run.
        world: of this rank.

    Raises:
        UserError: on all ranks, if there is no such run or checkpoint, or its recipe cannot be imported.
    """
    files = RunFiles(**collectives.on_root("run.files", lambda: vars(read_run_files(run_dir))))
    cls = collectives.on_all_ranks("run.recipe", lambda: import_run_class(files))
    opened = open_run(files, cls)
    values = {**opened.values, **{name: value for name, value in UNUSED_VALUES.items() if name in opened.values}}
    options = make_run_options({**values, **given})
    agree_on_options(opened.recipe, opened.name, options)
    configure_hang_reporter(world.rank, world.size, options.faults.hang_limit)
    set_now(opened.recipe, Now.before_training(opened.folder.absolute(), world.rank, world.size))
    found: checkpoint.Checkpoint | None = None

    def read_on_root() -> dict[str, object]:
        nonlocal found
        found = checkpoint.read_checkpoint(find_checkpoint(opened, which), opened.name)
        return asdict(found.position)

    position = Position(**collectives.on_root("run.checkpoint", read_on_root))  # type: ignore[arg-type]
    state = collectives.broadcast_bytes(found.state if found is not None else None, "run.state")
    return ReopenedRun(opened, options, position, state)
