"""The steps of a run with a parameter server: each makes a version of the weights, of gradients that workers send.

collect_version   items and weights go out, gradients come in (hvdtrain.server.item_server)
start_step        their weighted sum takes the place of the gradients of this rank's examples
all_reduce, apply_update, commit, evaluation, checkpoint: as in any run, of one rank
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from hvdtrain.elastic.generation import MembershipEnded
from hvdtrain.ledger.made import AppliedItem, MadeVersion
from hvdtrain.recipe.ranges import join_ranges
from hvdtrain.server.item_server import Contribution
from hvdtrain.server.items import EpochItems
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.training.hooks import find_lr_factor
from hvdtrain.training.loop import StepOutcome, collect_votes, update_model
from hvdtrain.training.nonfinite import count_skipped_step
from hvdtrain.training.plan import StepShare
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation
from hvdtrain.training.saving import save_checkpoint


def serve_versions(generation: Generation, position: Position) -> Iterator[tuple[StepShare, StepOutcome]]:
    """Make the versions of what is left of an epoch, on rank 0; yield each before it is committed."""
    run, plan = generation.run, generation.plan
    assert run.service is not None and run.service.server is not None and plan.service is not None
    server = run.service.server
    generation.set_now(position, training=True)
    generation.orders.begin_epoch(position, generation.ledger)
    if not server.has_begun:
        server.begin_run(plan.service.context, plan.service.per_version, position.step)
    items = EpochItems(plan.service.context, position.offset, position.owed)
    server.begin_epoch(position.epoch, items)
    while items.left and position.step < plan.total_steps:
        began = time.perf_counter()
        try:
            contributions = server.collect_version()
        except MembershipEnded as ended:
            if ended.exit_code == EXIT_REQUEUE and position.saved != position.step:  # with too few workers to go on
                save_checkpoint(generation, position, must=False)
            raise
        made = [[*contribution.assignment.item] for contribution in contributions]
        # In a checkpoint what is handed out and not applied is owed by the epoch: a resumed run begins with it.
        position.offset, position.owed = items.frontier, join_ranges(items.unapplied, made)
        yield make_version(generation, position, contributions, began)
        server.release(contributions)


def make_version(
    generation: Generation, position: Position, contributions: list[Contribution], began: float
) -> tuple[StepShare, StepOutcome]:
    """Update the weights by gradients that have arrived. began: when the version before was made."""
    run, plan = generation.run, generation.plan
    assert run.service is not None and run.service.server is not None
    server, results = run.service.server, [one.result for one in contributions]
    # The schedule goes by the examples that are applied, not by those that are handed out.
    applied = replace(position, offset=position.samples - position.epoch * plan.examples, owed=[])
    lr_factor, lr_hash = find_lr_factor(generation, applied, generation.set_now(position, training=True))
    for one in contributions:
        if not one.result.is_finite:
            where = f"the examples of rank {one.assignment.worker}"
            run.report.print_lines([f"worker    the loss of {where} in step {position.step + 1} is not finite"])
    votes = collect_votes(generation)
    votes = replace(
        votes,
        stop=votes.stop + sum(result.stop for result in results),
        examples=sum(result.examples for result in results),
        id_hashes=sum(result.id_hashes for result in results),
        lr_hashes=lr_hash,
    )
    result = server.sum_gradients(contributions, votes)
    if result.must_skip:
        count_skipped_step(generation, result, position)
    report = update_model(generation, position, result, lr_factor)
    if result.must_skip:
        server.others.tell("skip")
    else:
        server.others.tell("apply", plan.lr_scale * lr_factor, [run.options.data.seed, position.step, -1])
    ages = [position.step - one.assignment.read for one in contributions]
    report["staleness"] = sum(ages) / len(ages)
    ranges = join_ranges([[*one.assignment.item] for one in contributions])
    items = [AppliedItem(one.assignment.read, *one.assignment.item) for one in contributions]
    examples = sum(one.examples for one in contributions)
    share = StepShare(examples, 0, [], ranges, MadeVersion(plan.lr_scale * lr_factor, items))
    return share, StepOutcome(result, report, plan.lr * lr_factor, time.perf_counter() - began)
