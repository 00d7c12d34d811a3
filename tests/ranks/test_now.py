"""What a recipe knows of its training: `now` in each of its methods, on all ranks, and the evaluation sets."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvdtrain.recipe.base import Recipe, check_evals
from hvdtrain.recipe.now import Now
from hvdtrain.system.errors import RecipeError, UserError
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, train

RECIPES = Path(__file__).parent / "now_recipe.py"
EARLY = {"folder", "rank", "size"}


def read_notes(folder: Path, rank: int) -> dict[str, list[dict[str, Any]]]:
    """What a rank has noted, by the place."""
    found = defaultdict(list)
    for line in (folder / f"rank-{rank}").read_text().splitlines():
        where, now = json.loads(line)
        found[where].append(now)
    return found


def distinct(notes: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return list(dict.fromkeys(tuple(now[name] for name in names) for now in notes))


def test_now_is_right_in_each_method_on_all_ranks(world2: KeptWorld, tmp_path: Path) -> None:
    train(world2, f"{RECIPES}:Noting", tmp_path / "run", "--notes", str(tmp_path))
    notes = [read_notes(tmp_path, rank) for rank in range(2)]
    for rank, places in enumerate(notes):
        for name in ("model", "dataset(train)", "dataset(eval)", "optimizer"):
            assert [now.keys() for now in places[name]] == [EARLY], name
            assert places[name][0] == {"folder": str(tmp_path / "run"), "rank": rank, "size": 2}
        scores = places["score"]
        assert {(now["folder"], now["rank"], now["size"], now["steps"], now["epochs"]) for now in scores} == {
            (str(tmp_path / "run"), rank, 2, 6, 2)
        }
        trained = [now for now in scores if now["training"]]
        assert distinct(trained, "step", "epoch", "samples") == [
            *[(0, 0, 0), (1, 0, 4), (2, 0, 8), (3, 1, 10), (4, 1, 14), (5, 1, 18)]
        ]
        evaluated = [now for now in scores if not now["training"]]
        assert distinct(evaluated, "step", "epoch", "samples") == [(3, 1, 10), (6, 2, 20)]
        # Every epoch's examples are loaded in their own epoch; before, some are looked at as in the first step.
        loaded = [now for i in range(10) for now in places[f"train[{i}]"]]
        assert {(now["step"], now["epoch"]) for now in loaded} == {(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)}
        assert all(not now["training"] for i in range(4) for now in places[f"eval[{i}]"] if now["step"])


def test_now_is_right_directly_after_a_resume(world1: KeptWorld, world2: KeptWorld, tmp_path: Path) -> None:
    train(world2, f"{RECIPES}:Noting", tmp_path / "run", "--steps", "4", "--notes", str(tmp_path))
    for rank in range(2):
        (tmp_path / f"rank-{rank}").unlink()
    train(world1, f"{RECIPES}:Noting", tmp_path / "run", "--resume", "--epochs", "2")
    places = read_notes(tmp_path, 0)
    trained = [now for now in places["score"] if now["training"]]
    assert distinct(trained, "step", "epoch", "samples") == [(0, 0, 0), (4, 1, 14), (5, 1, 18)]  # the trial, then two
    assert places["score"][-1]["size"] == 1


def test_without_a_run_dir_all_ranks_know_the_folder_that_the_run_will_have(world2: KeptWorld, tmp_path: Path) -> None:
    world2.run(train_in_default_folder, str(tmp_path), cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").exists()
    for rank in range(2):
        assert {now["folder"] for notes in read_notes(tmp_path, rank).values() for now in notes} == {str(folder)}


def train_in_default_folder(notes: str) -> None:
    import hvdtrain
    from tests.ranks.now_recipe import Noting

    hvdtrain.fit(Noting(notes=notes), steps=1)


def test_a_run_that_is_refused_leaves_no_folder(world1: KeptWorld, tmp_path: Path) -> None:
    (error,) = world1.errors(ask_too_early, str(tmp_path), cwd=tmp_path)
    assert isinstance(error, RecipeError)
    assert str(error) == "AsksTooEarly.model() raised AttributeError: now.step is not known before training"
    assert not (tmp_path / "runs").exists()


def ask_too_early(notes: str) -> None:
    import hvdtrain
    from tests.ranks.now_recipe import AsksTooEarly

    hvdtrain.fit(AsksTooEarly(notes=notes), steps=1)


def test_now_cannot_be_changed() -> None:
    now = Now.before_training(Path("/runs/1"), 0, 2)
    assert repr(now) == f"Now(folder={Path('/runs/1')!r}, rank=0, size=2)"
    with pytest.raises(AttributeError, match=r"^now\.samples is not known before training$"):
        _ = now.samples
    with pytest.raises(AttributeError, match="cannot assign"):
        now.rank = 1  # type: ignore[misc]
    recipe = Recipe()
    with pytest.raises(AttributeError, match=r"^Recipe\.now is known in a training only$"):
        _ = recipe.now
    with pytest.raises(AttributeError):
        recipe.now = now  # type: ignore[misc]


def test_each_evaluation_set_has_its_columns_and_best_may_read_any(world2: KeptWorld, tmp_path: Path) -> None:
    """Against the scores of the whole sets by the weights that were saved."""
    summary = train(world2, f"{RECIPES}:Sets", tmp_path / "run", "--log-every", "3")
    expected = {}
    for step in (3, 6):
        state = torch.load(tmp_path / "run" / "checkpoints" / f"step-{step}" / "state", weights_only=True)
        for name, size, offset in (("eval", 5, 1.0), ("test", 7, -2.0)):
            x = torch.arange(size, dtype=torch.float64) / 10 + offset
            away = (x * state["model"]["weight"][0, 0] - x).abs()
            expected[step, name] = {"loss": float(away.square().mean()), "far": float(away.mean())}
    for row in rows(tmp_path / "run"):
        for name in ("eval", "test"):
            for metric, value in expected[row["step"], name].items():
                assert row[f"{name}_{metric}"] == pytest.approx(value, rel=1e-12)
        assert not any("unused" in column or "val_" in column.replace("eval_", "") for column in row)
    assert summary["eval"] == pytest.approx(expected[6, "eval"], rel=1e-12)
    assert summary["evals"].keys() == {"test"}
    assert summary["evals"]["test"] == pytest.approx(expected[6, "test"], rel=1e-12)
    far = {step: expected[step, "test"]["far"] for step in (3, 6)}
    best = max(far, key=far.__getitem__)
    assert summary["best"] == {"step": best, "metric": "test/far", "value": pytest.approx(far[best], rel=1e-12)}
    assert f"test/far {far[6]:.4f}" in world2.printed[0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "eval/loss", "test/loss", "test/far"} <= set(events.Tags()["scalars"])


def test_without_evaluation_sets_nothing_is_evaluated(world1: KeptWorld, tmp_path: Path) -> None:
    summary = train(world1, f"{RECIPES}:NoSets", tmp_path / "run", "--steps", "2")
    assert (summary["eval"], summary["evals"], summary["best"]) == ({}, {}, None)


@pytest.mark.parametrize(
    ("evals", "message"),
    [
        ("eval", "Mine.evals is 'eval'; expected a tuple of names"),
        (("eval", "train"), "Mine.evals: 'train' cannot be the name of an evaluation set"),
        (("a/b",), "Mine.evals: 'a/b' cannot be the name of an evaluation set"),
        (("a", "a"), "Mine.evals has 'a' twice"),
        (("val", "eval"), "Mine.evals: 'eval' comes first"),
    ],
)
def test_names_of_evaluation_sets_that_cannot_be_are_refused(evals: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{message}"):
        check_evals(type("Mine", (Recipe,), {"evals": evals}))


@pytest.mark.parametrize(
    ("best", "message"),
    [
        (("unused/far", "min"), "Sets.best: there is no metric 'unused/far'; there are: far, loss, test/far"),
        (("far", "max"), None),
        (("tset/far", "max"), "Sets.best: there is no metric 'tset/far'; did you mean 'test/far'"),
    ],
)
def test_best_that_names_no_metric_is_refused(
    best: Any, message: str | None, world1: KeptWorld, tmp_path: Path
) -> None:
    if message is None:
        world1.run(train_for_best, best, tmp_path / "run")
    else:
        (error,) = world1.errors(train_for_best, best, tmp_path / "run")
        assert str(error).startswith(message)


def train_for_best(best: Any, run_dir: Path) -> None:
    import hvdtrain
    from tests.ranks.now_recipe import Sets

    hvdtrain.fit(type("Sets", (Sets,), {"best": best, "__module__": Sets.__module__})(), run_dir=run_dir, steps=1)
