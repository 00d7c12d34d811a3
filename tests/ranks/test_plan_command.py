"""`hvdtrain plan`: the bytes of each layout are those counted by hand, and those that real ranks have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hvdtrain
from hvdtrain.bench.memory import LayoutRow, MemoryQuestion, plan_memory
from hvdtrain.recipe.framework import StepVotes
from hvdtrain.torch.recipe import Recipe
from hvdtrain.torch.step import TorchStep
from hvdtrain.training.options import split_options
from tests.ranks.harness import HVDTRAIN, run
from tests.ranks.memory_plan_recipes import Blocks, Counted, Holding, HoldingTables, Normed
from tests.support.worlds import KeptWorlds, train

RECIPES = Path(__file__).parent / "memory_plan_recipes.py"
FLOAT, ADAM = 4, 2 * 4  # bytes of a value, of Adam's two averages of it
STEP = 4  # bytes of Adam's count of steps, for each piece of a parameter
VALUES = 4 * 8 + 8 + 8 * 2 + 2
# What two examples keep: the input, the result of relu, which the second layer has as well, and the differences that
# are squared.
KEPT = (2 * 4 + 2 * 8 + 2 * 2) * FLOAT
TOTALS = [1080, 844, 1080]  # of all layouts on 3 ranks, apart from what is temporary


def plan_here(cls: type[Recipe], given: Mapping[str, object], ranks: int, replica: int) -> list[LayoutRow]:
    return plan_memory(hvdtrain.init(), MemoryQuestion(cls, given, ranks, replica, replica, 1 << 30, None))


def plan(worlds: KeptWorlds, cls: type[Recipe], ranks: int, replica: int = 1, **given: object) -> list[LayoutRow]:
    """replica: its ranks in layouts with stages or split layers."""
    return worlds[1].run(plan_here, cls, given, ranks, replica)[0]


def test_each_layout_has_the_bytes_counted_by_hand(worlds: KeptWorlds) -> None:
    """Of 58 values on 3 ranks: 20, 19 and 19. Buckets begin with the last layer: b2 w2 b1 | b1 w1 | w1."""
    plain, sharded, mirrored = (replace(row, temporary=0) for row in plan(worlds, Counted, 3))
    flat = (VALUES + 4) * FLOAT  # and a flag for each parameter
    assert plain == LayoutRow("data parallel", VALUES * FLOAT, flat + 2 * FLOAT, VALUES * ADAM + 4 * STEP, KEPT)
    assert sharded == LayoutRow("--shard optimizer", VALUES * FLOAT, flat + 20 * FLOAT, 20 * ADAM + 3 * STEP, KEPT)
    # Each has the part of the next one as well: the first b2 w2 b1 and b1 w1.
    assert (mirrored.gradients, mirrored.state) == (flat + (20 + 19) * FLOAT, (20 + 19) * ADAM + (3 + 2) * STEP)
    assert [row.total for row in (plain, sharded, mirrored)] == TOTALS
    printed = worlds[1].printed[0]
    assert "3 ranks, cpu; passes of 2 examples" in printed and printed.count("  fits") == 3


def test_a_row_says_whether_it_fits() -> None:
    row = LayoutRow("here", 1 << 20, 2 << 20, 3 << 20, 4 << 20, 5 << 20)
    assert row.format_row(4, 15 << 20).split() == ["here", "1.00", "2.00", "3.00", "4.00", "5.00", "15.00", "fits"]
    assert row.format_row(4, (15 << 20) - 1).endswith("  does not fit")


def test_ema_and_residuals_count(worlds: KeptWorlds) -> None:
    """int8 keeps two residuals of a bucket, and one of this rank's part of the sums, in whole blocks of 512."""
    plain, sharded, mirrored = plan(worlds, Counted, 2, ema=0.9, compression="int8,min=1")
    assert plain.state == VALUES * (ADAM + FLOAT) + 4 * STEP
    weights = 4 * 8 + 8 * 2
    assert plain.gradients == 3 * weights * FLOAT + 512 * FLOAT + 2 * FLOAT + (10 + 2 + 2) * FLOAT
    assert not sharded.refused and "mirrors do not encode" in mirrored.refused


def test_recomputation_keeps_one_block_at_a_time(worlds: KeptWorlds) -> None:
    rows = {row.layout: row for row in plan(worlds, Blocks, 3)}
    assert len(rows) == 8
    width = 2 * 16 * FLOAT  # of two examples, between layers
    ends = 2 * 4 * FLOAT + 2 * 2 * FLOAT  # the first input, and the differences that are squared
    # The first layer's result, and of each block what its two tanh return.
    assert rows["data parallel"].activations == ends + (1 + 3 * 2) * width
    # The inputs of the blocks and of the last layer; and of one block, which runs again, what its two tanh return.
    assert rows["--recompute all"].activations == ends + (3 + 1) * width + 2 * width
    assert rows["--shard optimizer --recompute all"].state == rows["--shard optimizer"].state


def test_a_model_that_three_ranks_hold_together_is_divided_by_rows(worlds: KeptWorlds) -> None:
    """Of 16 rows each rank has 6 at most, of 2 rows one; what is in no block is whole, and one block at a time."""
    rows = {row.layout: row for row in plan(worlds, Blocks, 3)}
    block, first, last = 2 * (16 * 16 + 16), 4 * 16 + 16, 16 * 2 + 2
    own = 3 * 2 * (6 * 16 + 6) + (6 * 4 + 6) + (16 + 1)
    found = rows["--shard model"]
    assert found.parameters == (own + first + last + block) * FLOAT
    assert (found.gradients, found.state) == (own * FLOAT, own * ADAM + 16 * STEP)
    assert found.activations == rows["data parallel"].activations
    assert rows["--shard model --recompute all"].parameters == found.parameters


def test_an_optimizer_that_cannot_be_divided_is_refused_in_its_row(worlds: KeptWorlds) -> None:
    plain, sharded, mirrored = plan(worlds, Normed, 2)
    assert not plain.refused and plain.state == 0
    assert sharded.refused == mirrored.refused == "the optimizer cannot be divided among ranks"


def measure_state(cls: type[Recipe], given: Mapping[str, object]) -> tuple[int, int]:
    """Make a step on a real rank; return the bytes of its optimizer's state and of its buckets."""
    recipe, options = split_options(cls, given)
    world = hvdtrain.init()
    step = TorchStep(recipe, world, options)
    try:
        step.start_step([1], 1 / world.size)
        step.cast_votes(StepVotes(examples=6 // world.size))
        count = 6 // world.size
        step.accumulate_gradients(step.splits.load_first_batch(count), count, 1 / 6, (0, 0))
        step.all_reduce()
        step.apply_update(1.0, (0, 0))
        (optimizer,) = step.updater.optimizers.values()
        tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        (exchange,) = [loss.bucketed_exchange for loss in step.updater.losses]
        assert exchange is not None
        flats = [bucket.reducer.flat.nbytes for bucket in exchange.buckets]
        return sum(x.nbytes for x in tensors), sum(flats)
    finally:
        step.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_real_ranks_have_what_is_planned(ranks: int, worlds: KeptWorlds) -> None:
    plain, sharded, mirrored = plan(worlds, Counted, ranks)
    for row, given in (
        (plain, {}),
        (sharded, {"shard": "optimizer"}),
        (mirrored, {"shard": "optimizer", "mirror": "1"}),
    ):
        found = worlds[ranks].run(measure_state, Counted, given)
        assert max(state for state, _ in found) == row.state, row.layout
    assert worlds[ranks].run(measure_state, Counted, {})[0][1] == plain.gradients


@pytest.mark.parametrize(
    ("cls", "layout", "options", "given"),
    [
        (Holding, "--stages 2", ("--stages", "2"), {}),
        (Holding, "--tensor 2", ("--tensor", "2"), {"ema": 0.9}),
        (HoldingTables, "data parallel", (), {}),
    ],
    ids=["stages", "tensor", "tables"],
)
def test_real_ranks_that_divide_a_model_have_what_is_planned(
    cls: type[Recipe],
    layout: str,
    options: tuple[str, ...],
    given: dict[str, object],
    worlds: KeptWorlds,
    tmp_path: Path,
) -> None:
    """Four ranks: two replicas of two, or dealt tables, of which one is larger than a rank's share."""
    row = next(row for row in plan(worlds, cls, 4, 2, **given) if row.layout == layout)
    train(worlds[4], f"{RECIPES}:{cls.__name__}", tmp_path / "run", *options, env={"HVDTRAIN_TEST_OUT": str(tmp_path)})
    parameters, state = max(json.loads((tmp_path / f"held{rank}").read_text()) for rank in range(4))
    average = row.parameters if given else 0
    assert (row.parameters, row.state) == (parameters, state + average)


def test_stages_keep_what_waits_for_its_backward_pass(worlds: KeptWorlds) -> None:
    """Two micro-batches of three examples: the first stage keeps both. A pass keeps all of one."""
    plain, *_, staged, split = plan(worlds, Holding, 2, 2, micro_batch=3)[:6]
    assert (plain.layout, staged.layout, split.layout) == ("data parallel", "--stages 2", "--tensor 2")
    width, ends = 3 * 16 * FLOAT, 3 * 4 * FLOAT
    # The input, the result of the first layer, and of each of two blocks what its two tanh return.
    assert staged.activations == 2 * (ends + (1 + 2 * 2) * width)
    # What is between the split layers of a block is halved.
    assert plain.activations - split.activations == 3 * width / 2


def test_the_command_prints_and_writes_the_rows(tmp_path: Path) -> None:
    command = [*HVDTRAIN, "plan", "-np", "3", "--memory", "1KiB", "--json", "rows.json", f"{RECIPES}:Counted"]
    done = run("alone", 1, command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["limit"] == 1024 and found["ranks"] == 3
    layouts = ["data parallel", "--shard optimizer", "--shard optimizer --mirror 1", "--stages 3"]
    assert [row["layout"] for row in found["rows"]] == layouts
    # The first of three stages has 40 values, and keeps of each of three micro-batches what it gets and returns.
    totals = [*TOTALS, 40 * (2 * FLOAT + ADAM) + 2 * STEP + 3 * (4 + 8) * FLOAT]
    assert [row["total"] - row["temporary"] for row in found["rows"]] == totals
    assert [row["fits"] for row in found["rows"]] == [row["total"] <= 1024 for row in found["rows"]]
    assert len(done.stdout.splitlines()) == 6
