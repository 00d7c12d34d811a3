"""Compare ways to train a recipe: the same first steps of real runs with other options, in turns.

turn 1   way 1: WARM_UP_STEPS + steps   way 2: the same   ...        a ratio of two ways is of the same turn
turn 2   ... way 2                      way 1                        and the next turn goes the other way round
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hvdtrain.bench.step import use_stock_horovod
from hvdtrain.bench.workload import WARM_UP_STEPS, describe_world, max_over_ranks, print_on_root
from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.elastic.membership import FixedMembership
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.options import OptionValues
from hvdtrain.system.errors import UserError
from hvdtrain.system.files import write_json
from hvdtrain.system.memory import PeakMemory
from hvdtrain.training.agreement import agree_on_options
from hvdtrain.training.config import build_config
from hvdtrain.training.fit import open_session
from hvdtrain.training.loop import run_loop
from hvdtrain.training.options import RunOptions, split_options
from hvdtrain.training.position import Position
from hvdtrain.training.reporter import Reporter, StepReport
from hvdtrain.training.run import Run

NEVER = 10**9  # steps between what is not to happen while steps are measured


@dataclass(frozen=True)
class WaysPlan:
    """What is compared.

    Attributes:
        recipe_class: of the recipe.
        name: of the recipe.
        ways: all options of each way, by its text; the first is what the others are compared with.
        steps: of each way and turn that count.
        turns: how often each way is measured.
        json_path: where rank 0 writes the rows; None: nowhere.
    """

    recipe_class: type[Recipe]
    name: str
    ways: Mapping[str, OptionValues]
    steps: int
    turns: int
    json_path: Path | None


@dataclass(frozen=True)
class TurnResult:
    """What was measured of a way in a turn; the most of all ranks, but for the bytes."""

    step_seconds: float  # mean
    waited_seconds: float  # mean, for communication
    wire_bytes: float  # mean, that this rank sends in a step
    memory_bytes: float  # peak, above what the process had before


@dataclass(frozen=True)
class WayRow:
    """A way's row; its fields are keys of the JSON file. Medians of the turns, of memory the most."""

    way: str
    step_seconds: float
    waited_seconds: float
    wire_bytes: float
    memory_bytes: float
    ratio: float  # of the step to the first way's in the same turn

    def format_row(self, width: int) -> str:
        """Return the row as text."""
        return (
            f"{self.way:{width}}  {self.step_seconds * 1e3:8.1f}  {self.waited_seconds * 1e3:9.1f}  "
            f"{self.wire_bytes / 1e6:9.3f}  {self.memory_bytes / 1e6:9.1f}  {self.ratio:7.2f}"
        )


class TurnEnded(Exception):
    """The steps of a turn were made."""


class TurnReporter(Reporter):
    """Notes what steps take, and raises TurnEnded after the last one of a turn.

    Attributes:
        ends: of each step, by time.perf_counter.
        waited: seconds for communication, of each step.
        sent: bytes, of each step.
    """

    def __init__(self, run: Run, last_step: int) -> None:
        """Report of a run instead of its own reporter."""
        super().__init__(run.options.reports, run.metrics)
        self._measured, self._last_step = run.step, last_step
        self.ends: list[float] = []
        self.waited: list[float] = []
        self.sent: list[int] = []

    def record_step(self, at: Position, step: StepReport) -> None:
        super().record_step(at, step)
        self.ends.append(time.perf_counter())
        self.waited.append(step.time.waited_seconds)
        self.sent.append(self._measured.wire_bytes())
        if at.step >= self._last_step:
            raise TurnEnded


def compare_ways(world: World, plan: WaysPlan) -> None:
    """Print a row for each way, and write the rows as JSON if there is a path."""
    results: dict[str, list[TurnResult]] = {way: [] for way in plan.ways}
    first = next(iter(plan.ways))
    _, device = measure_way(world, plan, first)  # does not count: some things are imported and loaded only once
    for turn in range(plan.turns):
        for way in list(plan.ways)[:: 1 if turn % 2 == 0 else -1]:
            results[way].append(measure_way(world, plan, way)[0])
    title = f"{plan.recipe_class.__name__}, {describe_world(world, device)}; {plan.turns} turns of {plan.steps} steps"
    width = max(22, *(len(way) for way in plan.ways))
    print_on_root(world, f"# {title}")
    print_on_root(world, f"{'way':{width}}   step ms  waited ms    sent MB  memory MB  x first")
    rows = make_rows(results)
    for row in rows:
        print_on_root(world, row.format_row(width))
    if plan.json_path is not None and world.rank == 0:
        write_json(plan.json_path, {"title": title, "ranks": world.size, "rows": [asdict(row) for row in rows]})


def make_rows(results: Mapping[str, Sequence[TurnResult]]) -> list[WayRow]:
    """Return the row of each way; results: of each way, by turns."""
    first = next(iter(results.values()))
    rows = []
    for way, own in results.items():
        ratios = [one.step_seconds / other.step_seconds for one, other in zip(own, first, strict=True)]
        rows.append(
            WayRow(
                way=way or "as it is",
                step_seconds=statistics.median(one.step_seconds for one in own),
                waited_seconds=statistics.median(one.waited_seconds for one in own),
                wire_bytes=statistics.median(one.wire_bytes for one in own),
                memory_bytes=max(one.memory_bytes for one in own),
                ratio=statistics.median(ratios),
            )
        )
    return rows


def measure_way(world: World, plan: WaysPlan, way: str) -> tuple[TurnResult, torch.device]:
    """Return `measure_turn` of a way. Raises UserError that names it."""
    try:
        return measure_turn(world, plan, plan.ways[way])
    except UserError as error:
        raise UserError(f"--way {way!r}: {error}") from error


def measure_turn(world: World, plan: WaysPlan, given: OptionValues) -> tuple[TurnResult, torch.device]:
    """Begin a run with these options, make its first steps and leave it; return what they took, and on which device.

    Raises UserError for options that are refused, and for a run that has fewer steps.
    """
    recipe, options = split_options(plan.recipe_class, given)
    agree_on_options(recipe, plan.name, options)
    if options.service.server is not None:
        raise UserError(f"--server {options.service.server}: a version is not a step of all ranks; leave it out")
    last_step = WARM_UP_STEPS + plan.steps
    with contextlib.ExitStack() as exits:
        if options.exchange.kind == "horovod":
            exits.enter_context(use_stock_horovod())
        options = silence_run(options, exits.enter_context(temporary_run_folder(world)))
        memory = PeakMemory()
        gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        config = build_config(plan.name, recipe, options)
        session = exits.enter_context(open_session(recipe, plan.name, options, config, world, FixedMembership()))
        report = TurnReporter(session.run, last_step)
        exits.enter_context(report)
        session.run = replace(session.run, report=report)
        generation, position = session.form_generation()
        if generation.plan.total_steps < last_step:
            raise UserError(
                f"the run has {generation.plan.total_steps} steps; expected {last_step}, of which {plan.steps} are "
                "measured: give more --epochs, or fewer --steps before RECIPE"
            )
        with contextlib.suppress(TurnEnded):
            run_loop(generation, position)
        is_gpu = session.run.step.gpu_uuid is not None
        peak = torch.cuda.max_memory_allocated() - gpu if is_gpu else memory.measure_bytes()
        seconds = (report.ends[-1] - report.ends[WARM_UP_STEPS - 1]) / plan.steps
        own = [seconds, statistics.fmean(report.waited[WARM_UP_STEPS:]), float(peak)]
        step_seconds, waited_seconds, memory_bytes = max_over_ranks("bench.turn", own)
        sent = statistics.fmean(report.sent[WARM_UP_STEPS:])
    return TurnResult(step_seconds, waited_seconds, sent, memory_bytes), torch.device("cuda" if is_gpu else "cpu")


def silence_run(options: RunOptions, folder: Path) -> RunOptions:
    """Return the options with nothing printed, evaluated or saved between the steps, in a run folder of its own."""
    reports = replace(options.reports, eval_every=NEVER, log_every=NEVER, loggers=(), quiet=True)
    return replace(options, checkpoints=replace(options.checkpoints, run_dir=folder, every=NEVER), reports=reports)


@contextlib.contextmanager
def temporary_run_folder(world: World) -> Iterator[Path]:
    """Yield a path on rank 0's host at which a run folder can be made; it is removed at the end."""
    parent = Path(collectives.on_root("bench.folder", lambda: tempfile.mkdtemp(prefix="hvdtrain-bench-")))
    try:
        yield parent / "run"
    finally:
        if world.rank == 0:
            shutil.rmtree(parent, ignore_errors=True)
