"""all_gather, all_reduce and SyncBatchNorm in `score`: as on one rank, or refused by name."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hvdtrain
from hvdtrain.recipe import order
from hvdtrain.system.errors import KnownError
from hvdtrain.torch import SyncBatchNorm, all_gather, all_reduce, own_rows
from hvdtrain.torch.data import seed_all
from hvdtrain.torch.tensors import read_tensors
from tests.ranks import contrastive_recipes
from tests.ranks.contrastive_recipes import Pairs
from tests.ranks.harness import rows
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, on_ranks

State = dict[str, torch.Tensor]
RANKS = [3, *slow(1, 2, 4)]


def fit(recipe: str, folder: Path, fields: dict[str, Any], options: dict[str, Any]) -> None:
    """Train on this rank."""
    made = getattr(contrastive_recipes, recipe)(**fields)
    hvdtrain.fit(made, run_dir=folder, threads=1, log_every=1, eval_every=3, logger=(), quiet=True, **options)


def read_run(folder: Path) -> tuple[list[float], list[float], State]:
    """The losses of all steps, those of the evaluations, and the model's final state."""
    logged, summary = rows(folder), json.loads((folder / "summary.json").read_text())
    state = read_tensors((folder / "checkpoints" / f"step-{summary['steps']}" / "state").read_bytes())["model"]
    evaluations = [row["eval_loss"] for row in logged if "eval_loss" in row]
    return [row["loss"] for row in logged], evaluations, state


@functools.cache
def train_plainly(name: str, fields: tuple[tuple[str, Any], ...] = ()) -> tuple[list[float], list[float], State]:
    """What `read_run` returns, of a plain loop in one process, whose batches are whole."""
    recipe: Pairs = getattr(contrastive_recipes, name)(**dict(fields))
    seed_all([0])
    model = recipe.model()
    optimizer = recipe.optimizer(list(model.parameters()))
    train, evaluated = recipe.dataset("train").tensors, recipe.dataset("eval").tensors
    losses, evaluations = [], []
    for epoch in range(recipe.epochs):
        for ids in order.iterate_batches(len(train[0]), recipe.batch_size, 0, epoch):
            model.train()
            optimizer.zero_grad()
            loss = recipe.whole_batch_loss(model, [t[torch.from_numpy(ids)] for t in train]).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) % 3 == 0 or len(losses) == recipe.epochs * -(-len(train[0]) // recipe.batch_size):
                model.eval()
                parts = -(-len(evaluated[0]) // recipe.batch_size)
                bounds = [order.part_bounds(len(evaluated[0]), part, parts) for part in range(parts)]
                with torch.no_grad():
                    found = [recipe.whole_batch_loss(model, [t[a:b] for t in evaluated]).sum() for a, b in bounds]
                evaluations.append(float(sum(found)) / len(evaluated[0]))
    return losses, evaluations, {name: t.clone() for name, t in model.state_dict().items()}


def compare(folder: Path, name: str, tolerance: float = 1e-12, **fields: Any) -> None:
    losses, evaluations, state = read_run(folder)
    expected = train_plainly(name, tuple(fields.items()))
    assert losses == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    assert evaluations == pytest.approx(expected[1], rel=tolerance, abs=tolerance)
    assert state.keys() == expected[2].keys()
    for key, value in state.items():
        torch.testing.assert_close(
            value, expected[2][key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k} {m}"
        )


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("name", "evaluated"), [("SimCLR", 11), ("CLIP", 3), ("Spread", 11)])
def test_losses_over_all_ranks_equal_one_ranks(
    name: str, evaluated: int, ranks: int, worlds: KeptWorlds, tmp_path: Path
) -> None:
    """41 examples in batches of 8: the last batch has one, on one rank. With 3 to evaluate, rank 3 of 4 has none."""
    worlds[ranks].run(fit, name, tmp_path / "run", {"num_evaluated": evaluated}, {})
    compare(tmp_path / "run", name, num_evaluated=evaluated)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("own", [False, True])
def test_sync_batch_norm_equals_one_ranks_batch_norm(own: bool, ranks: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    """42 examples in batches of 8: the last batch has two, on two ranks."""
    fields = {"momentum": None} if own else {}
    options = {} if own else {"sync_batchnorm": True}
    worlds[ranks].run(fit, "Norms", tmp_path / "run", {"own": own, **fields}, options)
    compare(tmp_path / "run", "Norms", **fields)


def test_sync_batch_norm_in_float32(world3: KeptWorld, tmp_path: Path) -> None:
    world3.run(fit, "Norms", tmp_path / "run", {"single": True, "lr": 0.001}, {"sync_batchnorm": True})
    compare(tmp_path / "run", "Norms", 2e-6, single=True, lr=0.001)


def test_a_rank_whose_loss_does_not_depend_on_the_others_takes_part(world2: KeptWorld, tmp_path: Path) -> None:
    """The other rank's gradient needs the part that flows back through this one's examples."""
    world2.run(fit, "Partial", tmp_path / "run", {}, {"sync_batchnorm": True})
    compare(tmp_path / "run", "Partial")


@pytest.mark.parametrize(
    ("fields", "options", "tolerance"),
    [
        ({"single": True, "lr": 0.001}, {"amp": "bf16"}, 0.02),
        ({"single": True, "lr": 0.001}, {"compression": "topk:0.5", "ema": 0.9, "clip_norm": 1.0}, 0.2),
    ],
)
def test_sync_batch_norm_with_other_options(
    fields: dict[str, Any], options: dict[str, Any], tolerance: float, worlds: KeptWorlds, tmp_path: Path
) -> None:
    """Against one rank with the same options; compression sends less on two."""
    for size in (1, 2):
        worlds[size].run(fit, "Norms", tmp_path / f"{size}", {"own": True, **fields}, options)
    one, two = (read_run(tmp_path / f"{size}") for size in (1, 2))
    assert two[0] == pytest.approx(one[0], rel=tolerance)
    assert two[1] == pytest.approx(one[1], rel=tolerance)


def test_a_run_is_resumed_in_mid_epoch(world2: KeptWorld, tmp_path: Path) -> None:
    world2.run(fit, "CLIP", tmp_path / "run", {}, {"steps": 4, "checkpoint_every": 2})
    world2.run(fit, "CLIP", tmp_path / "run", {}, {"steps": 12, "resume": True})
    losses, _, state = read_run(tmp_path / "run")
    expected = train_plainly("CLIP")
    assert losses == pytest.approx(expected[0], rel=1e-12)
    for key, value in state.items():
        torch.testing.assert_close(value, expected[2][key], rtol=1e-12, atol=1e-12)


def test_checkpointing_repeats_the_exchange(worlds: KeptWorlds, tmp_path: Path) -> None:
    """And moves the running statistics once."""
    for size in (1, 3):
        worlds[size].run(fit, "Norms", tmp_path / f"{size}", {"checkpointed": True}, {"sync_batchnorm": True})
        compare(tmp_path / f"{size}", "Norms", 1e-11)


CALL = "which --deterministic refuses: its result depends on the ranks in its last bits; leave out --deterministic"
PASSES = (
    ".score exchanges examples with the other ranks (all_gather, all_reduce or SyncBatchNorm), so a step must be one "
    "pass; with --micro-batch 3 it has up to 2: leave out --micro-batch, or choose a smaller --batch-size"
)


def test_what_cannot_be_exact_is_refused_before_the_first_step(worlds: KeptWorlds, tmp_path: Path) -> None:
    def refused(name: str, fields: dict[str, Any], options: dict[str, Any], ranks: int = 2) -> str:
        errors = worlds[ranks].errors(fit, name, tmp_path / "run", {"batch_size": 4 * ranks, **fields}, options)
        (text,) = {str(error) for error in errors}
        assert not (tmp_path / "run" / "metrics.jsonl").exists()
        return text

    assert refused("CLIP", {}, {"micro_batch": 3}, 1) == "CLIP" + PASSES
    assert refused("Norms", {"own": True}, {"micro_batch": 3}) == "Norms" + PASSES
    deterministic = {"deterministic": True, "virtual_shards": 4}
    assert refused("CLIP", {}, deterministic) == f"CLIP.score calls all_gather, {CALL}"
    assert refused("Norms", {"own": True}, deterministic) == f"Norms.score calls SyncBatchNorm, {CALL}"
    assert refused("Wrong", {"how": "number"}, {}) == "all_gather needs a tensor of shape (B, ...), got float"
    assert refused("Wrong", {"how": "scalar"}, {}) == "all_gather needs a tensor of shape (B, ...), got a scalar tensor"
    assert refused("Wrong", {"how": "horovod"}, {}) == (
        "Wrong.score differentiates through Horovod's allgather, whose gradient is averaged over ranks and would "
        "depend on their number; use hvdtrain.torch.all_gather"
    )
    assert refused("Wrong", {"how": "rows"}, {}) == "own_rows needs the tensor that all_gather has returned, itself"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "per example",
            "Wrong.score calls all_reduce with a tensor of shape (4,), and in its trial with two examples of shape "
            "(2,): sum over the examples first, or use all_gather",
        ),
        (
            "more",
            "Wrong.score calls all_gather of (4,) float64 as its collective number 2, and in its trial before the "
            "first step no such one: call the same ones in every step, for a rank without examples repeats those of "
            "the trial",
        ),
        (
            "fewer",
            "Wrong.score has called 0 collectives of hvdtrain, and 1 in its trial before the first step: call the same "
            "ones in every step, for a rank without examples repeats those of the trial",
        ),
        (
            "shapes",
            "Wrong.score calls collective 'score.0' with different shapes or types on different ranks: they must be "
            "equal but for the number of rows of all_gather (Mismatched ALLGATHER tensor shapes: ",
        ),
    ],
)
def test_calls_that_differ_between_steps_or_ranks_are_refused(
    how: str, message: str, world2: KeptWorld, tmp_path: Path
) -> None:
    errors = world2.errors(fit, "Wrong", tmp_path / "run", {"how": how}, {})
    assert all(str(error).startswith(message) for error in errors), errors


def test_a_layer_that_cannot_be_converted_is_refused() -> None:
    class Mine(torch.nn.BatchNorm2d):
        pass

    assert type(SyncBatchNorm.convert(torch.nn.BatchNorm2d(3))) is SyncBatchNorm
    assert type(SyncBatchNorm.convert(torch.nn.Sequential(torch.nn.SyncBatchNorm(3)))[0]) is SyncBatchNorm
    with pytest.raises(KnownError, match="'1' is a Mine, which cannot be converted to SyncBatchNorm; expected"):
        SyncBatchNorm.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3), Mine(3)))
    lazy = SyncBatchNorm.convert(torch.nn.LazyBatchNorm1d())
    lazy(torch.randn(4, 3))
    assert type(lazy) is SyncBatchNorm
    assert lazy(torch.randn(4, 3)).shape == (4, 3)


@on_ranks(2)
def test_any_type_is_gathered_and_summed() -> None:
    """Also outside a training, in a loop of one's own."""
    rank = hvdtrain.init().rank
    for dtype in (torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.int16, torch.int64):
        x = torch.arange(6).view(3, 2).to(dtype)[: 3 - rank]
        gathered = all_gather(x)
        assert gathered.dtype == dtype
        assert torch.equal(gathered, torch.arange(6).view(3, 2).to(dtype)[[0, 1, 2, 0, 1]])
        assert torch.equal(gathered[own_rows(gathered)], x)
        total = all_reduce(torch.ones(2, dtype=dtype))
        assert total.tolist() == [2, 2]
        assert total.dtype == (torch.int64 if dtype == torch.bool else dtype)
    for dtype in (torch.bfloat16, torch.complex64):
        x = torch.full((2 + rank,), 1.0 + rank, dtype=dtype, requires_grad=True)
        (all_gather(x).abs().square().sum() * (1 + rank)).backward()
        assert x.grad is not None and x.grad.dtype == dtype
        assert x.grad.tolist() == [2 * (1.0 + rank) * 3] * (2 + rank)
