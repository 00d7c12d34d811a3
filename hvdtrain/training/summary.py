"""The end of a run: its summary, and the wait for all ranks."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdtrain.comm import collectives
from hvdtrain.recipe.metrics import MetricValue, format_values
from hvdtrain.system import activity, messages
from hvdtrain.system.errors import EXIT_FAILED, EXIT_REQUEUE, RunError
from hvdtrain.system.text import format_count
from hvdtrain.training.checkpoint import BestCheckpoint
from hvdtrain.training.position import Position, join_metrics
from hvdtrain.training.run import Generation
from hvdtrain.training.session import Session
from hvdtrain.training.setup import collect_versions

MAX_HOSTS_SHOWN = 4  # in the last lines


@dataclass(frozen=True)
class Summary:
    """What summary.json holds: the fields are its keys."""

    recipe: str
    framework: str
    world_size: int
    steps: int
    epochs: int
    finished: bool  # False: the run was stopped, and can be resumed
    shares: Sequence[int]  # of the batch, by rank, in 1,024ths, at the end
    ended: str  # why it has ended before its last step; "": it has not
    samples_seen: int
    train_loss: float
    eval: Mapping[str, MetricValue]  # of the last evaluation, by metric
    evals: Mapping[str, Mapping[str, MetricValue]]  # the same of each evaluation set but the first, by its name
    best: BestCheckpoint | None  # of those that were evaluated
    wire_bytes_per_step: int
    compression: str
    compilations: int | None  # of rank 0's functions; None: of a framework that compiles none
    buckets: Sequence[Mapping[str, object]]
    sparsity: float | None  # the share of the weights that are pruned; None: without --prune
    membership_changes: int
    resumed_from: int | None  # a step
    skipped_nonfinite: int
    skipped: int  # steps that did not update the model, for whatever reason
    synthetic: bool  # the data is made up
    versions: Mapping[str, str]  # by package
    command: str  # of this rank
    git_commit: str | None  # of the repository that the recipe is in, with "-dirty" if files differ from it
    service: Mapping[str, object] | None  # servers, workers and what they did; None: without --server
    hosts: Sequence[str]
    samples_per_second: float
    step_seconds_median: float
    comm_seconds_median: float

    # What `hvdtrain.fit` returns to its users.
    def to_json(self) -> dict[str, Any]:
        """Return it as the plain data of summary.json."""
        return asdict(self)

    def describe(self, folder: Path, view_commands: Sequence[str]) -> list[str]:
        """Return how the run has ended, in a few lines to print. view_commands: show what the loggers have written."""
        best, ranks = self.best, format_count(self.world_size, "rank")
        shown = format_values(join_metrics(self.eval, self.evals))
        hosts = ", ".join(self.hosts[:MAX_HOSTS_SHOWN])
        hosts += f" and {len(self.hosts) - MAX_HOSTS_SHOWN} more" if len(self.hosts) > MAX_HOSTS_SHOWN else ""
        commit = f" (git {self.git_commit})" if self.git_commit is not None else ""
        return [
            f"command   {self.command}{commit}",
            *([f"evaluated {shown}"] if self.finished and shown else []),
            *([f"best      {best.metric} {best.value:.4f} at step {best.step}"] if best is not None else []),
            f"trained   {self.steps} steps, {self.samples_per_second:,.0f} samples/s on {ranks} of {hosts}",
            f"results   {', '.join([f'{folder}/summary.json', *view_commands])}",
        ]


def make_summary(session: Session, generation: Generation, position: Position, finished: bool) -> Summary:
    """Return the summary of a run that has ended at `position`, in the last generation of a session."""
    activity.enter_activity("ending the run", patient=True)
    run, rates = generation.run, generation.run.report.speed.measure_rates()
    report = run.step.exchange_report()
    server = run.service.server if run.service is not None else None
    return Summary(
        recipe=run.name,
        framework=run.recipe.framework,
        world_size=generation.world.size if server is None else server.roles.size,
        steps=position.step,
        epochs=generation.plan.epochs,
        finished=finished,
        shares=list(generation.plan.shares),
        ended=position.ended,
        samples_seen=position.samples,
        train_loss=position.train_loss,
        eval=position.eval,
        evals=position.evals,
        best=run.report.best,
        wire_bytes_per_step=run.step.wire_bytes(),
        compression=run.options.compression.spec,
        compilations=run.step.count_compilations(),
        buckets=report.buckets,
        sparsity=report.sparsity,
        membership_changes=run.membership.change_count,
        resumed_from=session.resumed_from,
        skipped_nonfinite=position.skipped_nonfinite,
        skipped=position.skipped,
        synthetic=bool(getattr(run.recipe, "synthetic", False)),
        versions=collect_versions(),
        command=shlex.join([name_program(sys.argv[0]), *sys.argv[1:]]),
        git_commit=session.git_commit,
        service=None if server is None else server.describe(),
        hosts=generation.hosts if server is None else server.hosts,
        samples_per_second=rates.samples_per_second,
        step_seconds_median=rates.step_seconds_median,
        comm_seconds_median=rates.comm_seconds_median,
    )


def name_program(path: str) -> str:
    """Return what a user would write for this program: `python -m hvdtrain` is the same as `hvdtrain`."""
    name = Path(path).name
    return "hvdtrain" if name == "__main__.py" else name


def write_summary(generation: Generation, summary: Summary) -> str | None:
    """Write summary.json on rank 0, the last file of a run; return why it cannot be written, if so."""
    run = generation.run
    run.lease.check_ownership()
    if not summary.finished:
        resume = f"--resume --run-dir {generation.folder}"
        run.report.print_lines([f"stopped   at step {summary.steps}, saved; to continue: {resume}"])
    error = run.report.write_summary(summary.to_json())
    if not error:
        run.report.print_lines(summary.describe(generation.folder, run.report.loggers.view_commands()))
    return error


def end_run(generation: Generation, summary: Summary, error: str | None) -> None:
    """Wait for the other ranks, all of which are done: launchers end all ranks when one has left.

    Args:
        generation: the last one.
        summary: how the run has ended.
        error: why this rank could not write what it had to.

    Raises:
        RunError: on all ranks, if one has an error.
    """
    membership, code = generation.run.membership, publish_ending(generation, summary, error)
    try:
        errors = collectives.gather_json(error, "end")
    except collectives.PeersLost:
        if not membership.has_run_ended():
            raise
        errors = [error or membership.find_end_error()]
    if found := next(filter(None, errors), None):
        raise RunError(found)
    messages.send_message(messages.RankFinished(generation.world.rank, code))


def publish_ending(generation: Generation, summary: Summary, error: str | None) -> int:
    """Publish, on rank 0, how the run has ended; return the exit code. Arguments as those of `end_run`."""
    code = EXIT_FAILED if error else 0 if summary.finished else EXIT_REQUEUE
    if generation.world.rank == 0:
        generation.run.membership.publish_end(code, error or "")
    return code


def end_rank(rank: int, summary: Summary) -> None:
    """Report to the launcher how a run has ended on a worker of a parameter server, which writes nothing."""
    messages.send_message(messages.RankFinished(rank, 0 if summary.finished else EXIT_REQUEUE))
