"""`--prune`: exactly so many weights are zero, on all ranks the same, for good; and pruned values do not travel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.pruning import Pruner
from hvdtrain.training.options import make_run_options
from tests.ranks import prune_recipes as recipes
from tests.ranks import several_recipes
from tests.ranks.elastic import ElasticJob, verify
from tests.ranks.harness import rows
from tests.ranks.prune_recipes import CLIP, NUM_WEIGHTS, WEIGHTS, fit, sparsity, train_plainly
from tests.ranks.test_several_optimizers import assert_same_state, read_state
from tests.support.worlds import KeptWorld, KeptWorlds, on_ranks, refusal, train

COLUMNS = f"{Path(__file__).parent / 'jax_recipes.py'}:Columns"
LINE = f"{Path(__file__).parent / 'jax_recipes.py'}:Line"


def count_zeros(state: dict[str, Any], names: tuple[str, ...] = WEIGHTS) -> int:
    return sum(int((state[name] == 0).sum()) for name in names)


@on_ranks(1, 2)
def test_pruned_training_is_that_of_plain_torch(tmp_path):
    """With momentum, weight decay, clipping, accumulation and averages, of which all but the last change zeros."""
    state, summary = fit(
        recipes.Sparse(), tmp_path / "run", prune="0.8,from:1ep,to:4ep", clip_norm=CLIP, micro_batch=3, ema=0.9
    )
    expected, average = train_plainly(0.8, 4, 16, 0.9)
    for name, values in expected.items():
        torch.testing.assert_close(state["model"][name], values, rtol=0, atol=1e-12)
        torch.testing.assert_close(state["ema"][f"module.{name}"], average[name], rtol=0, atol=1e-12)
        assert torch.equal(state["model"][name] == 0, values == 0)
    assert count_zeros(state["model"]) == round(0.8 * NUM_WEIGHTS) == round(summary["sparsity"] * NUM_WEIGHTS)
    assert count_zeros(state["ema"], tuple(f"module.{name}" for name in WEIGHTS)) == round(0.8 * NUM_WEIGHTS)
    shares = [round(sparsity(step, 0.8, 4, 16) * NUM_WEIGHTS) / NUM_WEIGHTS for step in range(1, 21)]
    assert [row["sparsity"] for row in rows(tmp_path / "run")] == shares


@on_ranks(2)
def test_pruned_values_do_not_travel(tmp_path):
    sent = [fit(recipes.Sparse(), tmp_path / str(i), **options)[1]["wire_bytes_per_step"] for i, options in enumerate(
        ({}, {"prune": "0.5,from:1ep,to:3ep"}, {"prune": "0.8,from:1ep,to:3ep"})
    )]  # fmt: skip
    assert sent[1] < 0.6 * sent[0]
    assert sent[2] < 0.35 * sent[0]


@on_ranks(2)
@pytest.mark.parametrize(
    "options",
    [{"clip_norm": CLIP, "ema": 0.9, "amp": "bf16"}, {"deterministic": True, "virtual_shards": 3}],
    ids=["averaged", "deterministic"],
)
def test_resumed_in_the_middle_has_the_same_bits(options, tmp_path):
    """Also on one rank and on two."""
    options = {"prune": "0.8,from:3,to:14", **options}
    whole, _ = fit(recipes.Adaptive(), tmp_path / "whole", steps=18, **options)
    fit(recipes.Adaptive(), tmp_path / "run", steps=9, **options)
    resumed, summary = fit(recipes.Adaptive(), tmp_path / "run", steps=18, resume=True, **options)
    assert_same_state(resumed, whole)
    assert count_zeros(whole["model"]) == round(0.8 * NUM_WEIGHTS)
    assert summary["resumed_from"] == 9


def deterministic_bits(folder: Path) -> dict[str, bytes]:
    state, _ = fit(recipes.Adaptive(), folder, deterministic=True, virtual_shards=3, prune="0.8,from:2,to:9", steps=12)
    return {name: p.numpy().tobytes() for name, p in state["model"].items()}


def test_deterministic_bits_do_not_depend_on_the_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    runs = [bits for size in (1, 2) for bits in worlds[size].run(deterministic_bits, tmp_path / str(size))]
    assert all(bits == runs[0] for bits in runs)


@on_ranks(1, 2)
def test_sparse_gradients_and_several_optimizers_are_pruned(tmp_path):
    state, _ = fit(recipes.Rows(), tmp_path / "rows", prune="0.7,from:1ep,to:3ep")
    assert count_zeros(state["model"], ("weight",)) == round(0.7 * 600)
    state, summary = fit(several_recipes.Duel(turns="d g both"), tmp_path / "duel", prune="0.6,from:2,to:9")
    weights = tuple(name for name in state["model"] if name.endswith("weight"))
    count = sum(state["model"][name].numel() for name in weights)
    assert count_zeros(state["model"], weights) == round(0.6 * count) == round(summary["sparsity"] * count)


def test_recipes_of_other_frameworks_are_pruned(world2: KeptWorld, tmp_path: Path) -> None:
    """And resumed in the middle with the same bits."""
    options = ("--prune", "0.7,from:2,to:9", "--threads", "1", "--ema", "0.9")
    train(world2, COLUMNS, tmp_path / "whole", "--steps", "12", *options)
    train(world2, COLUMNS, tmp_path / "run", "--steps", "6", *options)
    train(world2, COLUMNS, tmp_path / "run", "--steps", "12", "--resume", *options)
    whole, resumed = (read_state(tmp_path / name, 12) for name in ("whole", "run"))
    assert_same_state(resumed, whole)
    (weight,) = (name for name, p in whole["model"].items() if p.dim() == 2)
    assert count_zeros(whole["model"], (weight,)) == round(0.7 * 120)


@pytest.mark.slow
def test_pruned_weights_stay_pruned_when_ranks_are_lost_and_join(world1: KeptWorld, tmp_path: Path) -> None:
    recipe = f"{Path(__file__).parent / 'prune_recipes.py'}:SlowSparse"
    options = ("--epochs", "12", "--prune", "0.8,from:2,to:44", "--ema", "0.9")
    train(world1, recipe, tmp_path / "reference", "--threads", "1", "--log-every", "1", *options)
    with ElasticJob(tmp_path, "localhost:2", "--pause", "0.4", *options, recipe=recipe) as job:
        job.step(8)
        job.kill(1)
        job.world(1)
        job.world(2)
        job.more(1)
        job.end()
    columns = [[(row["step"], row["sparsity"]) for row in rows(run)] for run in (tmp_path / "reference", job.run_dir)]
    assert columns[0] == columns[1]
    state, expected = (read_state(run, 48) for run in (job.run_dir, tmp_path / "reference"))
    for part in ("model", "ema"):
        for name, values in expected[part].items():
            torch.testing.assert_close(state[part][name], values, rtol=0, atol=1e-9)
    assert count_zeros(state["model"]) == round(0.8 * NUM_WEIGHTS)
    assert_same_state(state["pruned"], expected["pruned"])
    verify(job.run_dir)


def train_and_forget(folder: Path) -> None:
    fit(recipes.Sparse(), folder, prune="0.8,from:3,to:14", steps=8)


def resume_dense(folder: Path) -> None:
    fit(recipes.Sparse(), folder, resume=True, steps=12)


def prune_nothing(folder: Path) -> None:
    fit(recipes.Flat(), folder, prune="0.8,from:3,to:14")


def prune_backwards(folder: Path) -> None:
    fit(recipes.Sparse(), folder, prune="0.8,from:1ep,to:2")


def test_what_cannot_be_pruned_is_refused(world1: KeptWorld, tmp_path: Path) -> None:
    world1.run(train_and_forget, tmp_path / "run")
    cases = [
        (resume_dense, "run", "the checkpoint's weights are pruned, and would grow again: give its --prune to resume"),
        (prune_nothing, "flat", "--prune: no parameter of Flat's model can be pruned; expected trained ones of two"),
        (prune_backwards, "back", "--prune 0.8,from:1ep,to:2: from:1ep is not before to:2; expected a share"),
    ]
    for function, folder, text in cases:
        assert text in str(world1.errors(function, tmp_path / folder)[0])
    assert "--prune: no parameter of Line's model can be pruned" in refusal(
        world1, LINE, tmp_path / "jax", "--prune", "0.8,from:3,to:4"
    )


@pytest.mark.parametrize(
    "compute",
    [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm],
    ids=["hook", "weight norm", "spectral norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_layer_that_computes_its_weight_is_refused(compute: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), compute(nn.Linear(4, 2)))
    with pytest.raises(UserError, match="'1' of Net's model computes its weight from other parameters"):
        Pruner("Net", model, set(model.parameters()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"prune": "0.8"},
            "--prune 0.8: it says how many weights, and not when; expected a share of the weights and two",
        ),
        ({"prune": "80,from:1,to:2"}, "'80' is not a share between 0 and 1"),
        ({"prune": "0.8,from:1ep,to:2x"}, "'2x' is not a position; give epochs ('5ep') or steps ('500')"),
        ({"prune": "0.8,from:1,to:2", "compression": "int8"}, "--compression int8: pruned values do not travel"),
        ({"prune": "0.8,from:1,to:2", "exchange": "horovod"}, "--exchange horovod: it sends pruned values"),
    ],
)
def test_other_texts_and_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as refused:
        make_run_options(options)
    assert text in str(refused.value)
