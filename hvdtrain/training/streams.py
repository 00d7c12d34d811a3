"""Training on a stream, whose examples have no numbers: what it needs of a run, and where each rank is in its part."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from hvdtrain.recipe.framework import DataSource
from hvdtrain.recipe.order import MAX_EXAMPLES, Ids, share_bounds
from hvdtrain.recipe.shares import format_shares
from hvdtrain.system.errors import UserError
from hvdtrain.training.options import RunOptions
from hvdtrain.training.plan import StepShare, TrainingPlan
from hvdtrain.training.position import Position

SOURCE_TEXTS = {
    DataSource.NUMBERED: "",
    DataSource.ROLLOUTS: "played by the model (what a rank keeps of them is not saved)",
    DataSource.STREAM: "of a stream that every rank reads, no ledger",
    DataSource.DIVIDED_STREAM: "of a stream, each rank its part, no ledger",
}


def is_stream(source: DataSource) -> bool:
    """Return whether examples are read in the order of a stream."""
    return source in (DataSource.STREAM, DataSource.DIVIDED_STREAM)


def leave_out_ledger(options: RunOptions, source: DataSource) -> RunOptions:
    """Return the options for examples from this source: a stream's have no numbers that a ledger could record."""
    return replace(options, checkpoints=replace(options.checkpoints, ledger=False)) if is_stream(source) else options


def check_length(options: RunOptions, examples: int, schedule: str) -> None:
    """Raise UserError for an epoch of unknown length in a run that needs to know it."""
    if examples < MAX_EXAMPLES:
        return
    if options.data.steps is None:
        raise UserError("the training data is a Stream of unknown length: give it examples_per_epoch, or add --steps N")
    if re.search(r"\dep\b", schedule):
        raise UserError(
            f"schedule {schedule!r} counts epochs, and the training data is a Stream of unknown length: give it "
            "examples_per_epoch, or count steps ('warmup:500 cosine')"
        )


def check_division(
    source: DataSource, plan: TrainingPlan, position: Position, *, world_may_change: bool, shares_may_change: bool
) -> None:
    """Raise UserError if a divided stream would not be continued where its ranks have left it.

    Sets in `position` what the parts depend on.
    """
    if source is not DataSource.DIVIDED_STREAM:
        position.division = ""
        return
    whole = "let its factory take no arguments, so that every rank reads all of it"
    if world_may_change:
        raise UserError(f"each rank reads its part of the Stream, so their number must not change (--elastic): {whole}")
    if shares_may_change:
        raise UserError(
            "each rank reads its part of the Stream, so their shares must not change (--shares measured): give "
            f"numbers, as 3:1:1, or {whole}"
        )
    if plan.deterministic:
        raise UserError(f"each rank reads its part of the Stream, so training depends on their number; {whole}")
    epoch = "" if plan.examples == MAX_EXAMPLES else f", epochs of {plan.examples} examples"
    dealt = f", shares {shares}" if (shares := format_shares(plan.shares)) else ""
    division = f"{plan.ranks} ranks, batches of {plan.batch_size}{epoch}{dealt}"
    if position.step and position.division != division:
        before = position.division or "another kind of data"
        raise UserError(f"cannot resume with {division}: the parts of the Stream were read with {before}; {whole}")
    position.division = division


def refuse_unnumbered_rounds(source: DataSource, local_steps: int) -> None:
    """Raise UserError for examples that could not be trained again by another rank than the one that was lost."""
    if source is not DataSource.NUMBERED:
        made = "are played by the model" if source is DataSource.ROLLOUTS else "come from a Stream"
        raise UserError(
            f"--local-steps {local_steps}: in an elastic run the others train the examples of a lost rank again, and "
            f"those of this recipe {made}, where they cannot be had again; leave out --local-steps or --elastic"
        )


def count_own_examples(plan: TrainingPlan, position: Position, rank: int) -> int:
    """Return how many examples of its part of a divided stream a rank has read before `position`."""

    def count_share(examples: int) -> int:
        begin, end = share_bounds(examples, rank, plan.shares)
        return end - begin

    steps, rest = divmod(plan.examples, plan.batch_size)
    per_step = count_share(plan.batch_size)
    per_epoch = steps * per_step + count_share(rest)
    return position.epoch * per_epoch + position.offset // plan.batch_size * per_step


def number_own_examples(shares: Iterator[StepShare], first: int) -> Iterator[StepShare]:
    """Yield shares whose ids count the examples of this rank's part of a divided stream, from `first` on."""
    for share in shares:
        shards: list[list[Ids]] = []
        for shard in share.shards:
            shards.append([])
            for ids in shard:
                shards[-1].append(np.arange(first, first + len(ids)))
                first += len(ids)
        yield replace(share, shards=shards)
