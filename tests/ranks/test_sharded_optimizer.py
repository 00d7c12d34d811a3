"""--shard optimizer: each rank has a part of the optimizer's state, and training is the same as without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import changing_recipes
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

RECIPES = Path(__file__).parent / "sharded_recipes.py"
SHARDED = f"{RECIPES}:Sharded"
SHARD = ("--shard", "optimizer")


def state(folder: Path) -> dict[str, Any]:
    """A run's last checkpoint."""
    steps = json.loads((folder / "summary.json").read_text())["steps"]
    loaded: dict[str, Any] = torch.load(folder / "checkpoints" / f"step-{steps}" / "state", weights_only=True)
    return loaded


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """All leaves of a checkpoint but the exchange's part, by their paths."""
    if isinstance(value, dict):
        parts = [flatten(v, f"{path}.{k}") for k, v in value.items() if path or k != "exchange"]
    elif isinstance(value, list):
        parts = [flatten(v, f"{path}.{i}") for i, v in enumerate(value)]
    else:
        return {path: value}
    return {k: v for part in parts for k, v in part.items()}


def assert_same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """The checkpoints hold the same: to the bit, or floating values to a relative tolerance."""
    first, second = flatten(state(one)), flatten(state(other))
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and tolerance:
            torch.testing.assert_close(second[key], value, rtol=tolerance, atol=tolerance, msg=key)
        elif isinstance(value, torch.Tensor):
            assert value.stride() == second[key].stride(), key
            assert torch.equal(value, second[key]), key
        else:
            assert value == second[key], key


def train_both(world: KeptWorld, folder: Path, *options: str) -> None:
    for name, more in (("plain", ()), ("sharded", SHARD)):
        train(world, SHARDED, folder / name, "--log-every", "1", "--threads", "1", *options, *more)


@pytest.mark.parametrize(
    "options",
    [
        ("--kind", "sgd"),
        ("--kind", "adamw", "--skips", "--bucket-mib", "0.001"),
        ("--kind", "adagrad", "--amp", "fp16", "--ema", "0.9", "--micro-batch", "4"),
    ],
    ids=["sgd", "adamw", "adagrad-fp16-ema-accumulation"],
)
def test_two_ranks_have_the_bits_of_the_plain_step(options: tuple[str, ...], world2: KeptWorld, tmp_path: Path) -> None:
    """11 steps, the last of which is ragged: 20 examples of 28."""
    train_both(world2, tmp_path, *options)
    assert_same(tmp_path / "plain", tmp_path / "sharded")
    assert rows(tmp_path / "plain")[-1]["loss"] == rows(tmp_path / "sharded")[-1]["loss"]


def test_two_ranks_clip_to_the_norm_of_all_parts(world2: KeptWorld, tmp_path: Path) -> None:
    """The squares are added in another order: so not to the bit."""
    train_both(world2, tmp_path, "--clip-norm", "0.05", "--amp", "fp16", "--micro-batch", "4", "--ema", "0.9")
    assert_same(tmp_path / "plain", tmp_path / "sharded", 1e-6)
    pairs = list(zip(rows(tmp_path / "plain"), rows(tmp_path / "sharded"), strict=True))
    for one, other in pairs:
        if one["gradient_norm"] is not None or other["gradient_norm"] is not None:  # of a step that is not skipped
            assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)
        assert one["loss_scale"] == other["loss_scale"]
    assert max(one["gradient_norm"] or 0 for one, _ in pairs) > 0.05, "the clipping must bite"


@pytest.mark.parametrize("ranks", [3, 4])
def test_more_ranks_in_float64(ranks: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    train_both(worlds[ranks], tmp_path, "--dtype", "float64", "--skips", "--clip-norm", "0.5", "--ema", "0.9")
    assert_same(tmp_path / "plain", tmp_path / "sharded", 1e-12)


@pytest.mark.parametrize("kind", ["adafactor", "lars"])
def test_others_are_sharded_by_whole_parameters(kind: str, world2: KeptWorld, tmp_path: Path) -> None:
    train_both(world2, tmp_path, "--kind", kind, "--skips", "--bucket-mib", "0.0001")  # some buckets have one owner
    assert "by whole parameters" in world2.printed[0]
    assert_same(tmp_path / "plain", tmp_path / "sharded")


def test_deterministic_runs_have_the_same_bits_on_any_number_of_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    options = ["--deterministic", "--clip-norm", "0.5", "--ema", "0.9", "--skips", "--steps", "7"]
    train(worlds[1], SHARDED, tmp_path / "plain", *options)
    for ranks in (1, 2, 3, 4):
        train(worlds[ranks], SHARDED, tmp_path / str(ranks), *options, *SHARD)
        assert_same(tmp_path / "plain", tmp_path / str(ranks))


def test_runs_resume_on_other_ranks_and_with_or_without_shards(worlds: KeptWorlds, tmp_path: Path) -> None:
    """3 ranks sharded, 2 ranks plain, 2 ranks sharded, 3 plain: as one rank alone."""
    options = ["--dtype", "float64", "--checkpoint-every", "3", "--threads", "1"]
    train(worlds[1], SHARDED, tmp_path / "alone", *options, "--steps", "8")
    folder = tmp_path / "run"
    train(worlds[3], SHARDED, folder, *options, "--steps", "3", *SHARD)
    for ranks, steps, shard in ((2, 5, "none"), (2, 7, "optimizer"), (3, 8, "none")):
        resumed = train(worlds[ranks], SHARDED, folder, "--resume", "--steps", str(steps), "--shard", shard)
        assert resumed["steps"] == steps
    assert_same(tmp_path / "alone", folder, 1e-12)


def test_each_rank_has_its_part_of_the_state(worlds: KeptWorlds, tmp_path: Path) -> None:
    """Adam has 8 bytes of state for each value that is trained: of 217 + 31 + 403 + 13 + 13 + 13 + 1 + 7 + 1."""
    values = 699
    for ranks in (2, 3):
        folder = tmp_path / str(ranks)
        train(worlds[ranks], SHARDED, folder, "--steps", "2", *SHARD, env={"HVDTRAIN_TEST_OUT": str(tmp_path)})
        found = [json.loads((tmp_path / f"bytes{rank}.json").read_text()) for rank in range(ranks)]
        assert sum(found) == 8 * values
        assert found[0] == max(found) == 8 * -(-values // ranks)  # all in one bucket
        line = "shard     optimizer: 0.0 of 0.0 MiB of state on each rank, element-wise; gradients by "
        assert line in worlds[ranks].printed[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--kind", "global"], "GlobalNorm cannot be divided among ranks: what it does to a parameter depends on"),
        (["--compression", "int8", "--mirror", "1"], "--mirror 1 with --compression int8: mirrors do not encode"),
        (["--compression", "powersgd:4"], "--shard optimizer with --compression powersgd:4: "),
        (["--prune", "0.5,from:1,to:3"], "--prune 0.5,from:1,to:3 with --shard optimizer: "),
        (["--exchange", "horovod"], "--shard optimizer with --exchange horovod: "),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(
    options: list[str], text: str, world2: KeptWorld, tmp_path: Path
) -> None:
    found = refusal(world2, SHARDED, tmp_path / "run", *SHARD, *options)
    assert text in found and "\n" not in found
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["Duel", "Ratio"])
def test_each_of_several_optimizers_is_sharded(name: str, world2: KeptWorld, tmp_path: Path) -> None:
    recipe = f"{RECIPES.with_name('several_recipes.py')}:{name}"
    for folder, more in (("plain", ()), ("sharded", SHARD)):
        train(world2, recipe, tmp_path / folder, "--threads", "1", "--steps", "9", *more)
    assert_same(tmp_path / "plain", tmp_path / "sharded", 1e-12)


def train_changing(name: str, folder: Path) -> None:
    """A recipe that changes what is trained, sharded, as in plain torch."""
    found, _ = changing_recipes.fit(getattr(changing_recipes, name), folder, skip_nonfinite=1, shard="optimizer")
    expected = changing_recipes.train_plainly(getattr(changing_recipes, name)())
    for key, p in found.items():
        torch.testing.assert_close(p, expected[key], rtol=1e-12, atol=1e-12, msg=key)


CHANGING = ["Unfrozen", "InTurns", "Gradual", "BiasesOnly", "LoRA", "Grown", "InScore", "Required", "Delegated"]
CHANGING += ["Twice", "Complex", "WithoutGraph", "Forces", "NanGradient", "Reentrant", "NotReentrant"]


@pytest.mark.parametrize("name", CHANGING)
def test_what_is_trained_may_change(name: str, worlds: KeptWorlds, tmp_path: Path) -> None:
    worlds[3].run(train_changing, name, tmp_path / "run")


def test_an_optimizer_that_holds_more_than_its_state_is_refused(world2: KeptWorld, tmp_path: Path) -> None:
    recipe = f"{RECIPES.with_name('changing_recipes.py')}:Around"
    found = refusal(world2, recipe, tmp_path / "run", *SHARD)
    assert found.startswith("Around.optimizer: Lookahead cannot be divided among ranks: ") and "\n" not in found


def test_gradients_that_are_not_finite_are_named_on_all_ranks(world2: KeptWorld, tmp_path: Path) -> None:
    found = refusal(world2, f"{RECIPES}:Spoiled", tmp_path / "run", *SHARD)
    plain = refusal(world2, f"{RECIPES}:Spoiled", tmp_path / "plain")
    assert "body.0.weight" in found and found == plain
