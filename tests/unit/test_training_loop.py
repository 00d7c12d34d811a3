"""The training loop without ranks: votes, and what follows from their sums."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.elastic.membership import FixedMembership
from hvdtrain.ledger.rows import MAX_STEP_EXAMPLES
from hvdtrain.recipe.framework import NUM_VOTES, StepVotes
from hvdtrain.training.loop import Ending, decide, is_due
from hvdtrain.training.position import Position

COUNT = st.integers(0, MAX_STEP_EXAMPLES // 2 * (2**32 - 1))  # of each of two ranks
VOTES = st.builds(StepVotes, *[st.integers(0, 1)] * 3, *[COUNT] * (NUM_VOTES - 3))


@given(VOTES, VOTES)
def test_votes_add_up_exactly(one: StepVotes, other: StepVotes) -> None:
    both = StepVotes.from_vector(one.to_vector() + other.to_vector())
    assert vars(both) == {name: value + vars(other)[name] for name, value in vars(one).items()}


@pytest.mark.parametrize(
    ("votes", "ending"),
    [
        (StepVotes(), None),
        (StepVotes(stop=1), Ending.STOPPED),
        (StepVotes(leave=1), Ending.MEMBERS_LEAVE),
        (StepVotes(leave=2), Ending.MEMBERS_LEAVE),
        (StepVotes(leave=3), Ending.STOPPED),  # one of four ranks would be left, and two are the minimum
        (StepVotes(regroup=1), Ending.MEMBERS_JOIN),
        (StepVotes(leave=1, regroup=4), Ending.MEMBERS_LEAVE),  # which also lets newcomers in, and saves before
        (StepVotes(stop=1, leave=1, regroup=1), Ending.STOPPED),
    ],
)
def test_the_sums_of_votes_decide_how_a_generation_ends(votes: StepVotes, ending: Ending | None) -> None:
    membership = SimpleNamespace(is_below_minimum=lambda members: members < 2)
    generation: Any = SimpleNamespace(
        plan=SimpleNamespace(total_steps=10), world=SimpleNamespace(size=4), run=SimpleNamespace(membership=membership)
    )
    assert decide(generation, Position(step=9), votes) == ending
    assert decide(generation, Position(step=10), votes) == Ending.FINISHED


@pytest.mark.parametrize("ask", ["request_stop", "request_leave"])
def test_a_rank_of_fixed_membership_cannot_leave_alone(ask: str) -> None:
    membership = FixedMembership()
    assert not membership.poll_requests().stop
    getattr(membership, ask)()
    assert membership.poll_requests().stop and not membership.poll_requests().leave


def test_errors_end_a_run_of_fixed_membership() -> None:
    with pytest.raises(ZeroDivisionError):
        FixedMembership().recover_from(ZeroDivisionError(), 3)


@pytest.mark.parametrize(
    ("step", "every", "epoch_ends", "due"),
    [(10, 5, False, True), (11, 5, True, False), (11, None, True, True), (10, None, False, False)],
)
def test_every_n_steps_or_else_once_an_epoch(step: int, every: int | None, epoch_ends: bool, due: bool) -> None:
    assert is_due(step, every, epoch_ends) == due
