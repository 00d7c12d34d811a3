"""Shares of the global batch, without ranks: how they are given, dealt, measured and recorded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.comm import collectives
from hvdtrain.ledger.reader import find_segments, read_segment
from hvdtrain.ledger.rows import LedgerRow, sum_id_hashes
from hvdtrain.ledger.verify import verify_ledger
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe import order
from hvdtrain.recipe.shares import (
    choose_shares,
    describe_shares,
    even_shares,
    format_shares,
    make_shares,
    parse_shares,
)
from hvdtrain.system.errors import UserError
from hvdtrain.training import balance
from hvdtrain.training.balance import SpeedComparison, find_better_shares
from hvdtrain.training.options import make_run_options
from hvdtrain.training.plan import TrainingPlan
from tests.unit.test_model_changes import plan

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


@given(st.integers(0, 500), WEIGHTS)
def test_parts_cover_the_batch_in_order_and_are_as_large_as_their_shares(count: int, weights: list[float]) -> None:
    shares = make_shares(weights)
    bounds = [order.share_bounds(count, rank, shares) for rank in range(len(shares))]
    assert [first for first, _ in bounds] == [0, *[end for _, end in bounds[:-1]]] and bounds[-1][1] == count
    assert sum(shares) == 1024 and min(shares) >= 1
    if not order.is_even(shares):
        assert all(
            abs(end - first - count * part / 1024) < 1 for (first, end), part in zip(bounds, shares, strict=True)
        )


@given(st.integers(0, 500), st.integers(1, 40), st.integers(0, 39))
def test_even_shares_deal_as_without_shares(count: int, ranks: int, rank: int) -> None:
    rank %= ranks
    for shares in (even_shares(ranks), make_shares([2.5] * ranks), choose_shares("even", ranks)):
        assert order.share_bounds(count, rank, shares) == order.part_bounds(count, rank, ranks)
        assert format_shares(shares) == "" and describe_shares(shares) == "even"


def test_shares_are_1024ths_by_largest_remainder() -> None:
    assert choose_shares("3:1:1", 3) == (614, 205, 205)
    assert choose_shares("1:2", 2) == (341, 683)
    assert choose_shares("1e9:1", 2) == (1023, 1)
    assert choose_shares("0.5:1.5", 2) == (256, 768)
    assert even_shares(3) == (342, 341, 341)
    assert make_shares([1, 1, 1e9], least=32) == (32, 32, 960)
    assert make_shares([1, 3], least=2000) == (512, 512)
    assert parse_shares(format_shares((683, 341))) == (683, 341)


@pytest.mark.parametrize("text", ["0:1", "-1:2", "nan:1", "inf:1", "1:", "", "fast", "3,1", "1:2:x"])
def test_what_is_not_shares_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refused:
        make_run_options({"shares": text})
    assert str(refused.value) == (
        f"--shares is {text!r}; expected even, measured, or a number above 0 for each rank in rank order, as 3:1:1"
    )


def test_shares_and_ranks_must_fit() -> None:
    with pytest.raises(UserError, match="--shares 3:1 has 2 numbers, and there are 3 ranks: give one for each rank"):
        choose_shares("3:1", 3)
    with pytest.raises(
        UserError, match="--shares measured divides the batch into 1024 parts, and there are 1025 ranks"
    ):
        choose_shares("measured", 1025)
    with pytest.raises(UserError, match="--shares 3:1 with --batch-per-rank 8: every rank has as many examples"):
        make_run_options({"shares": "3:1", "batch_per_rank": 8})
    assert choose_shares("measured", 2, "683:341") == (683, 341)
    assert choose_shares("measured", 3, "683:341") == even_shares(3)
    assert choose_shares("even", 2, "683:341") == choose_shares("measured", 2) == (512, 512)
    for damaged in ("683:342", "683", "a:b", "683:341:", "-1:1025"):
        with pytest.raises(UserError, match="are not shares of a batch"):
            parse_shares(damaged)


@pytest.mark.parametrize(("micro", "passes", "size"), [(None, 1, 22), (5, 5, 5), (21, 1, 21)])
def test_passes_are_as_large_as_the_largest_share_unless_they_are_limited(
    micro: int | None, passes: int, size: int
) -> None:
    options = make_run_options({"shares": "2:1", "micro_batch": micro})
    made = plan(100, 32, 2, 1, 2, 1).deal_by((683, 341), options)
    assert (made.max_passes, made.micro_batch) == (passes, size)
    assert made.count_dealt() == [21, 11]
    assert options.find_pass_sizes(32, (683, 341), 1).training == min(11, size)
    assert options.find_pass_sizes(32, (683, 341)).evaluation == min(16, micro or 16)


def test_virtual_shards_are_dealt_whole() -> None:
    options = make_run_options({"shares": "3:1", "deterministic": True})
    made = replace(plan(100, 30, 2, 3, 12, 1), deterministic=True).deal_by((768, 256), options)
    assert [len(made.find_shard_bounds(30, rank)) for rank in (0, 1)] == [9, 3]
    assert (made.micro_batch, made.max_passes) == (3, 9)


# Measured shares.


def better(made: TrainingPlan, seconds: list[float], step: float = 0.0) -> tuple[int, ...] | None:
    found = find_better_shares(made, make_run_options({"shares": "measured"}), seconds, step)
    return found and found.shares


def test_the_batch_is_dealt_in_proportion_to_speeds() -> None:
    made = plan(10000, 300, 2, 150, 2, 1)
    assert better(made, [1.0, 2.0]) == (683, 341)
    assert better(plan(10000, 400, 4, 100, 4, 1), [1, 1, 1, 2]) == (293, 293, 292, 146)
    found = find_better_shares(made, make_run_options({}), [1.0, 2.0], 150.0)
    assert found is not None and found.gain == pytest.approx(1 / 3)  # of 300 s, 100 s
    assert better(made, [1.0, 1.09]) is None  # it would save less than 5 % of a step
    assert better(made, [1.0, 2.0], step=3000) is None  # nor does this, of a step that others take long for
    assert better(made, [1.0, math.nan]) is None
    # Once they are dealt so, they stay.
    assert better(made.deal_by((683, 341), make_run_options({})), [1.0, 2.0]) is None


def test_no_rank_is_left_without_an_example() -> None:
    """Else its speed would not be known any more."""
    made = plan(1000, 32, 4, 8, 4, 1)
    shares = better(made, [1, 1, 1, 1000])
    assert shares is not None
    assert min(made.deal_by(shares, make_run_options({})).count_dealt()) == 1
    assert better(plan(1000, 2, 4, 1, 4, 1), [1, 1, 1, 5]) is None


def meter(steps: list[tuple[int, float, float]], clock: Any = lambda: 0.0) -> SpeedComparison:
    made = SpeedComparison(clock)
    for step in steps:
        made.record_step(*step)
    return made


def test_speeds_are_compared_after_20_steps_and_then_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "gather_array", lambda values, name: np.stack([values, values]))
    now = [1000.0]
    made = meter([(10, 0.5, 1.0)] * 20, lambda: now[0])
    assert not made.is_due()  # the first step does not count
    made.record_step(10, 0.5, 1.0)
    assert made.is_due()
    assert made.find_shares(plan(1000, 20, 2, 10, 2, 1), make_run_options({})) is None  # both are as fast
    now[0] += 59
    assert not made.is_due()
    now[0] += 1
    assert made.is_due()
    made.forget_steps()
    assert not made.is_due()


def test_short_steps_are_compared_when_they_have_lasted_long_enough() -> None:
    assert not meter([(10, 0.01, 0.02)] * 99).is_due()
    assert meter([(10, 0.01, 0.02)] * 102).is_due()


def test_an_example_takes_what_it_takes_in_most_groups_of_steps() -> None:
    assert meter([(10, 0.5, 1.0)] * 30).measure_example() == pytest.approx(0.05)
    assert meter([(10, 0.5, 1.0)] * 15 + [(5, 5.0, 9.0)] * 6).measure_example() == pytest.approx(0.05)
    # A core with half of its time: two steps of 25 ms run, then it stands still for 50 ms.
    throttled = [(10, 0.025, 0.05), (10, 0.075, 0.05)] * 60
    assert meter(throttled).measure_example() == pytest.approx(0.005)
    assert math.isnan(meter([(0, 0.1, 1.0)] * 30).measure_example())
    assert math.isnan(SpeedComparison().measure_example())
    assert balance.make_speed_comparison(make_run_options({"shares": "measured"}), 1) is None


# What the ledger keeps of them.


def row(step: int) -> LedgerRow:
    """Of a run of batches of 4, with epochs of 8 examples."""
    epoch, offset = (step - 1) // 2, (step - 1) % 2 * 4
    ids = order.SampleOrder(8, 0, epoch).ids_between(offset, offset + 4)
    return LedgerRow(step, epoch + 1, offset, 4, sum_id_hashes(ids))


def last_segment(folder: Path) -> list[str]:
    return max(find_segments(folder).items())[1].read_text().splitlines()


def test_changes_of_shares_are_in_the_ledger_and_outlive_who_wrote_them(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    writer, other = (Ledger(0, 8, 4) for _ in range(2))
    writer.set_shares(1, "")
    writer.open_for_writing(folder)
    assert last_segment(folder)[0] == "# hvdtrain ledger 2 seed=0 examples=8 batch=4 first_step=1"
    for ledger in (writer, other):
        for step in range(1, 7):
            if step in (3, 5):
                ledger.set_shares(step, {3: "683:341", 5: "700:324"}[step])
                ledger.set_shares(step, {3: "683:341", 5: "700:324"}[step])  # they are known already
            ledger.append_row(row(step))
    assert [line for line in last_segment(folder)[1:] if "#" in line] == ["# shares 3 683:341", "# shares 5 700:324"]
    writer.close()
    # The rows up to step 3 are on disk for good. Another rank writes the others again, then another world begins.
    other.discard_rows(3)
    other = Ledger.from_state(other.to_state(), {})
    other.roll_back(6)
    other.set_shares(7, "")
    other.open_for_writing(folder)
    other.append_row(row(7))
    other.close()
    lines = last_segment(folder)
    assert lines[0].endswith(" first_step=4 shares=683:341")
    assert [line for line in lines[1:] if "#" in line] == ["# shares 5 700:324", "# shares 7 even"]
    found = verify_ledger(tmp_path)
    assert found.is_exactly_once and found.steps == 7
    assert found.shares == [(3, "683:341"), (5, "700:324"), (7, "")]
    assert found.format_lines()[1] == (
        "shares of the batch: 683:341 from step 3 on, 700:324 from step 5 on, even from step 7 on"
    )


def test_shares_of_steps_that_are_undone_are_forgotten(tmp_path: Path) -> None:
    ledger = Ledger(0, 8, 4)
    ledger.set_shares(1, "683:341")
    ledger.open_for_writing(tmp_path / "ledger")
    for step in (1, 2, 3):
        ledger.append_row(row(step))
    ledger.set_shares(4, "700:324")
    ledger.roll_back(2)
    assert ledger.shares == {1: "683:341"}
    ledger.close()
    assert read_segment(max(find_segments(tmp_path / "ledger").items())[1]).find_shares(3) == "683:341"


def test_a_damaged_line_of_shares_is_a_defect(tmp_path: Path) -> None:
    ledger = Ledger(0, 8, 4)
    ledger.open_for_writing(tmp_path / "ledger")
    ledger.append_row(row(1))
    ledger.close()
    with (tmp_path / "ledger" / "segment-000001.csv").open("a") as file:
        file.write("# shares 2 683;341\n")
    assert [defect.text for defect in verify_ledger(tmp_path).findings] == [
        "segment-000001.csv: line 4 is not a valid row"
    ]
