"""Recipes with an optimizer for each of several losses, against plain torch in float64."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.torch.tensors import read_tensors
from tests.ranks import several_recipes as recipes
from tests.ranks.elastic import ElasticJob, verify
from tests.ranks.harness import rows
from tests.ranks.several_recipes import fit, train_plainly
from tests.ranks.test_changing_recipes import check_same
from tests.support.worlds import KeptWorld, KeptWorlds, on_ranks, train

RECIPE = f"{Path(__file__).parent / 'several_recipes.py'}"
TURNS = ["both", "d g", "d both g"]


@on_ranks(1, 2, 3, 4)
@pytest.mark.parametrize("turns", TURNS)
def test_several_losses_train_as_in_plain_torch(turns, tmp_path):
    """The last batch has 3 examples, so that of 4 ranks one has none."""
    for name, options in (("whole", {}), ("parts", {"micro_batch": 2, "clip_norm": 0.1})):
        found, _ = fit(recipes.Duel(turns=turns), tmp_path / name, **options)
        check_same(found, train_plainly(recipes.Duel(turns=turns), turns.split(), options.get("clip_norm")))


@on_ranks(1, 3)
def test_a_loss_of_several_may_have_denominators(tmp_path):
    found, summary = fit(recipes.Ratio(turns="d g both"), tmp_path / "run", micro_batch=2)
    check_same(found, train_plainly(recipes.Ratio(turns="d g both"), ["d", "g", "both"]))
    assert summary["eval"]["loss"] == summary["eval"]["loss_d"] + summary["eval"]["loss_g"]


@on_ranks(2)
@pytest.mark.parametrize("turns", ["both", "d g"])
def test_several_losses_compressed_train_close_to_plain_torch(turns, tmp_path):
    """And a layer of the one network may have an argument of its own."""
    for spec, tolerance in (("topk:1.0,min=1,warmup=0,layer.d.0=1.0", 1e-5), ("fp16,min=1", 5e-3)):
        found, _ = fit(recipes.Duel(turns=turns), tmp_path / spec[:4], compression=spec)
        check_same(found, train_plainly(recipes.Duel(turns=turns), turns.split()), tolerance)


def deterministic_bits(folder: Path) -> dict[str, bytes]:
    recipe = recipes.Ratio(turns="d g both")
    found, _ = fit(recipe, folder / str(collectives.size()), deterministic=True, micro_batch=2)
    return {name: p.numpy().tobytes() for name, p in found.items()}


def test_deterministic_bits_do_not_depend_on_the_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    runs = [bits for size in (1, 2, 3) for bits in worlds[size].run(deterministic_bits, tmp_path)]
    assert len(runs) == 6
    assert all(bits == runs[0] for bits in runs)


def resume(folder: Path, **options: Any) -> None:
    """Train to the end, and again with an end after 7 of 12 steps in between: the discriminator's turn is next."""
    make = {"turns": "d g g", "schedule": "constant"}
    fit(recipes.Duel(**make), folder / "whole", steps=12, log_every=1, **options)
    fit(recipes.Duel(**make), folder / "run", steps=7, log_every=1, **options)
    collectives.gather_json(None, "test.both")
    fit(recipes.Duel(**make), folder / "run", steps=12, resume=True, log_every=1, **options)


def read_state(folder: Path, step: int = 12) -> Any:
    return read_tensors((folder / "checkpoints" / f"step-{step}" / "state").read_bytes())


def assert_same_state(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for own, theirs in zip(one, other, strict=True):
            assert_same_state(own, theirs)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    "options",
    [
        {"amp": "bf16", "ema": 0.9, "clip_norm": 0.5},
        {"compression": "topk:0.3,min=1,warmup=0", "checkpoint_residuals": "exact"},
    ],
    ids=["ema", "residuals"],
)
def test_resumed_between_turns_is_bit_identical(options: dict[str, Any], world2: KeptWorld, tmp_path: Path) -> None:
    world2.run(resume_with, tmp_path, options)
    assert_same_state(read_state(tmp_path / "run"), read_state(tmp_path / "whole"))
    assert [row["loss"] for row in rows(tmp_path / "run")] == [row["loss"] for row in rows(tmp_path / "whole")]


def resume_with(folder: Path, options: dict[str, Any]) -> None:
    resume(folder, **options)


def fit_named(name: str, folder: Path, fields: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return fit(getattr(recipes, name)(**fields), folder, **options)[1]


def refused(world: KeptWorld, name: str, folder: Path, **options: Any) -> str:
    (text,) = {str(error) for error in world.errors(fit_named, name, folder, {}, options)}
    return text


def test_a_loss_scale_is_one_for_all_optimizers(world2: KeptWorld, tmp_path: Path) -> None:
    world2.run(fit_named, "Duel", tmp_path / "run", {"turns": "d g"}, {"amp": "fp16", "log_every": 1})
    written = rows(tmp_path / "run")
    assert {row["loss_scale"] for row in written} == {65536.0}
    assert all(row["skipped"] == 0 for row in written)
    state = read_state(tmp_path / "run")
    assert state["scaler"]["scale"] == 65536.0
    assert set(state["optimizers"]) == {"loss_d", "loss_g"}


def test_columns_and_exchange_of_several_losses(world2: KeptWorld, tmp_path: Path) -> None:
    options = {"log_every": 1, "clip_norm": 1.0}
    summary = world2.run(fit_named, "Duel", tmp_path / "run", {"turns": "d g both"}, options)[0]
    first, second, third = rows(tmp_path / "run")[:3]
    assert (first["loss_g"], second["loss_d"]) == (None, None)
    assert (first["loss"], second["loss"]) == (first["loss_d"], second["loss_g"])
    assert third["loss"] == third["loss_d"] + third["loss_g"]
    assert [third["lr"], third["lr_d"], third["lr_g"]] == pytest.approx([0.05, 0.05, 0.01])
    assert "gradient_norm_g" not in first and third["gradient_norm_g"] != third["gradient_norm_d"]
    assert {bucket["loss"] for bucket in summary["buckets"]} == {"loss_d", "loss_g"}
    assert summary["wire_bytes_per_step"] > 0
    assert summary["best"]["metric"] == "score_d"


def test_a_best_checkpoint_by_the_sum_of_losses_is_told(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, f"{RECIPE}:Unmeasured", tmp_path / "run", "--steps", "2")
    line = "best      is chosen by 'loss', the sum of loss_d and loss_g: name a metric, e.g. best = ('accuracy', 'max')"
    assert line in world2.printed[0].splitlines()
    assert summary["best"]["value"] == summary["eval"]["loss"]


REFUSED = {
    "Uneven": "Uneven.score has returned 'loss_d' in a part of the step's passes only (1 of 1 on rank 0, 0 of 1 on "
    "rank 1): what it leaves out may depend on self.now (not on its rank), and not on the examples",
    "NoLoss": "NoLoss.score has returned none of loss_d, loss_g in a training step: there is nothing to train; return "
    "one at least",
    "Missing": "Missing.score must return a dict with 'loss_d', 'loss_g', one for each optimizer, unless "
    "self.now.training; in an evaluation it lacks 'loss_g'",
    "Gathers": "Gathers.score calls all_gather, which a recipe with several optimizers cannot use: its losses are "
    "differentiated one by one; use one optimizer with several parameter groups, and batch or group norm in place of "
    "SyncBatchNorm",
    "Shared": "Shared.optimizer: parameter d.0.weight is in the optimizers of 'loss_d' and 'loss_g': give it to one",
    "Detached": "Detached.score: 'loss_g' depends on no parameter of its own optimizer that is trained, on no rank: "
    "compute it from the model's outputs, without detach(), item() or no_grad(), and with parameters that require a "
    "gradient",
}


@pytest.mark.parametrize("name", REFUSED)
def test_several_optimizers_are_refused_by_name(name: str, world2: KeptWorld, tmp_path: Path) -> None:
    assert refused(world2, name, tmp_path / "run") == REFUSED[name]


@on_ranks(1, 2)
def test_options_for_one_optimizer_are_refused(tmp_path):
    for option, text in (
        ({"compression": "auto"}, "--compression auto measures the steps of one optimizer"),
        ({"exchange": "horovod"}, "--exchange horovod takes one optimizer"),
        ({"compression": "topk:0.5,layer.h=none"}, "there is no parameter or module 'h'"),
    ):
        with pytest.raises(UserError, match=text):
            fit(recipes.Duel(), tmp_path / "run", **option)
    assert all(not p._post_accumulate_grad_hooks for p in recipes.BUILT[-1].parameters()), "its hooks are left behind"


@on_ranks(2)
def test_resumed_before_a_loss_was_trained_at_all(tmp_path):
    fields = {"turns": "d d d d g", "schedule": "constant"}
    fit(recipes.Duel(**fields), tmp_path / "run", steps=3)
    found, _ = fit(recipes.Duel(**fields), tmp_path / "run", steps=12, resume=True)
    check_same(found, train_plainly(recipes.Duel(**fields), fields["turns"].split()))


def test_a_loss_without_weight_is_not_updated_and_keeps_its_residuals(world2: KeptWorld, tmp_path: Path) -> None:
    options = {"compression": "topk:0.3,min=1,warmup=0", "checkpoint_every": 1, "steps": 3}
    world2.run(fit_named, "Weightless", tmp_path / "run", {"schedule": "constant"}, options)
    before, after = (read_state(tmp_path / "run", step) for step in (2, 3))
    assert_same_state(before["optimizers"]["loss_g"], after["optimizers"]["loss_g"])
    residuals = [state["exchange"]["loss_g"]["debts"] for state in (before, after)]
    assert any(part.any() for part in residuals[0].values())
    for key, part in residuals[0].items():  # summed over ranks, in another order
        torch.testing.assert_close(residuals[1][key], part)
    for name, value in before["model"].items():
        assert torch.equal(value, after["model"][name]) == name.startswith("g.")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("samples_per_second", "comm_seconds")}


@pytest.mark.slow
def test_a_lost_rank_leaves_turns_and_rows_as_they_are(tmp_path: Path, world1: KeptWorld) -> None:
    """A row is of 3 steps, and the rank is lost between two rows: those that go on have the sums of its steps."""
    recipe, options = f"{RECIPE}:SlowRatio", ("--epochs", "12", "--ema", "0.9", "--log-every", "3")
    train(world1, recipe, tmp_path / "reference", "--threads", "1", "--pause", "0", *options)
    with ElasticJob(tmp_path, "localhost:2", "--pause", "0.4", *options, recipe=recipe) as job:
        job.step(1)
        time.sleep(0.6)  # in the middle of step 5
        job.kill(1)
        job.world(1)
        job.world(2)
        job.more(1)
        job.end()
    expected, found = rows(tmp_path / "reference"), rows(job.run_dir)
    assert [row["step"] for row in found] == list(range(3, 73, 3))
    for one, other in zip(found, expected, strict=True):
        assert without_times(one) == pytest.approx(without_times(other), rel=1e-9)
    verify(job.run_dir)


def test_a_checkpoint_of_other_losses_is_refused(world1: KeptWorld, tmp_path: Path) -> None:
    world1.run(fit_named, "Duel", tmp_path / "run", {}, {"steps": 2})
    fields = {"generator_loss": "cost"}
    (error,) = world1.errors(fit_named, "Duel", tmp_path / "run", fields, {"resume": True, "steps": 4})
    assert str(error) == (
        "the checkpoint's optimizers minimize loss_d, loss_g, and this run's loss_d, cost: return the same from "
        "optimizer() to resume"
    )
