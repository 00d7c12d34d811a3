"""Other shares of the batch in the midst of a generation, as `--shares measured` finds them."""

from __future__ import annotations

from dataclasses import replace

from hvdtrain.comm import collectives
from hvdtrain.recipe.shares import choose_shares, describe_shares, format_shares
from hvdtrain.system.errors import UserError
from hvdtrain.training.position import Position
from hvdtrain.training.run import Generation
from hvdtrain.training.setup import check_passes


def find_new_shares(generation: Generation, position: Position) -> bool:
    """Compare the ranks' speeds after a step, on all ranks; return whether `position` has other shares then."""
    run, plan = generation.run, generation.plan
    assert generation.speeds is not None
    found = generation.speeds.find_shares(plan, run.options)
    if found is None:
        return False
    hosts = collectives.gather_json(generation.world.host, "shares.hosts")
    try:
        check_passes(run, plan.deal_by(found.shares, run.options), position)
    except UserError as error:
        run.report.print_lines([f"shares    stay {describe_shares(plan.shares)}: otherwise {error}"])
        return False
    fastest, slowest = min(found.example_seconds), max(found.example_seconds)
    rank = found.example_seconds.index(slowest)
    new, slow = describe_shares(found.shares), f"rank {rank} on {hosts[rank]}"
    why = f"{slow} takes {1000 * slowest:.3g} ms for an example, the fastest {1000 * fastest:.3g} ms"
    line = f"shares    {new} from step {position.step + 1} on: {why}; saves {found.gain:.0%} of a step"
    run.report.print_lines([line])
    position.shares = format_shares(found.shares)
    return True


def deal_again(generation: Generation, position: Position) -> Generation:
    """Return the generation with the shares of `position`, for the steps to come."""
    run, ranks = generation.run, generation.world.data_size
    shares = choose_shares(run.options.data.shares, ranks, position.shares)
    run.step.deal_batch(shares)
    generation.ledger.set_shares(position.step + 1, position.shares)
    if generation.diagnosis is not None:
        generation.diagnosis.comparison.shares = shares
    if generation.speeds is not None:
        generation.speeds.forget_steps()
    return replace(generation, plan=generation.plan.deal_by(shares, run.options))
