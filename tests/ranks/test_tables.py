"""Embedding tables that are dealt to the ranks: training is the same as with whole tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import hvdtrain
from tests.ranks.harness import ROOT, rows
from tests.ranks.table_recipes import ROWS
from tests.ranks.test_sharded_optimizer import assert_same
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

RECIPES = Path(__file__).parent / "table_recipes.py"
DEALT = f"{RECIPES}:Dealt"
PRECISE = f"{RECIPES}:Precise"
RECOMMEND = str(ROOT / "recipes" / "recommend.py")


def train_both(worlds: KeptWorlds, ranks: int, folder: Path, *options: str, recipe: str = DEALT) -> None:
    """Train on one rank, and on several with tables dealt to them."""
    train(worlds[1], recipe, folder / "alone", "--threads", "1", *options)
    train(worlds[ranks], recipe, folder / "dealt", "--threads", "1", *options)
    assert "tables    " in worlds[ranks].printed[0]


CASES: list[tuple[int, tuple[str, ...]]] = [
    (2, ("--kind", "momentum", "--log-every", "1")),
    (3, ("--kind", "sgd", "--sparse", "--together", "--ema", "0.9")),
    (2, ("--kind", "adagrad", "--sparse", "--clip-norm", "0.5", "--ema", "0.9", "--micro-batch", "5")),
    (4, ("--kind", "adamw", "--together", "--micro-batch", "4")),
]
MORE_CASES: list[tuple[int, tuple[str, ...]]] = [
    (ranks, ("--kind", kind, *more))
    for ranks in (2, 3, 4)
    for kind in ("momentum", "adagrad", "adamw")
    for more in (("--clip-norm", "0.1", "--micro-batch", "3"), ("--together", "--batch-size", "31", "--ema", "0.9"))
]


@pytest.mark.parametrize(("ranks", "options"), CASES)
def test_dealt_tables_are_trained_as_on_one_rank(
    ranks: int, options: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path
) -> None:
    """Three epochs, in float64, with a step of six examples: some ranks have fewer passes than others, or none."""
    train_both(worlds, ranks, tmp_path, *options)
    assert_same(tmp_path / "alone", tmp_path / "dealt", 1e-12)
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "dealt"), strict=True):
        for key in {"loss", "eval_loss", "gradient_norm"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "options"), MORE_CASES)
def test_dealt_tables_are_trained_as_on_one_rank_in_more_cases(
    ranks: int, options: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path
) -> None:
    train_both(worlds, ranks, tmp_path, *options)
    assert_same(tmp_path / "alone", tmp_path / "dealt", 1e-12)


def test_rows_are_partitioned_exactly(worlds: KeptWorlds, tmp_path: Path) -> None:
    """The first table is larger than half of all values, and is cut."""
    for ranks in (2, 3):
        train(worlds[ranks], DEALT, tmp_path / str(ranks), "--steps", "1", env={"HVDTRAIN_TEST_OUT": str(tmp_path)})
        found = [json.loads((tmp_path / f"rows{rank}.json").read_text()) for rank in range(ranks)]
        names = ("users", "items", "words", "one", "tags")
        for name, count in zip(names, ROWS, strict=True):
            assert sum(own[f"{name}.weight"] for own in found) == count
        assert all(own["users.weight"] < ROWS[0] for own in found)
        line = next(line for line in worlds[ranks].printed[0].splitlines() if line.startswith("tables"))
        assert line.endswith(f"of 5 tables on each rank at most, {ranks - 1} cut by rows") or "cut by rows" in line


def test_runs_resume_on_other_ranks_and_with_whole_tables(worlds: KeptWorlds, tmp_path: Path) -> None:
    """3 ranks, 2 ranks, 2 ranks with whole tables, 3 ranks: as one rank alone; adagrad has a state at once."""
    options = ["--kind", "adagrad", "--sparse", "--ema", "0.9", "--checkpoint-every", "3", "--threads", "1"]
    train(worlds[1], DEALT, tmp_path / "alone", *options, "--steps", "8")
    folder = tmp_path / "run"
    train(worlds[3], DEALT, folder, *options, "--steps", "3")
    for ranks, steps, tables in ((2, 5, "dealt"), (2, 6, "whole"), (3, 8, "dealt")):
        resumed = train(worlds[ranks], DEALT, folder, "--resume", "--steps", str(steps), "--tables", tables)
        assert resumed["steps"] == steps
        assert ("tables    " in worlds[ranks].printed[0]) == (tables == "dealt")
    assert_same(tmp_path / "alone", folder, 1e-12)


def evaluate_here(folder: Path) -> dict[str, Any]:
    from hvdtrain.training.evaluating import evaluate_run

    return asdict(evaluate_run(folder, "last", None, {"threads": 1}, hvdtrain.init()))


def test_a_checkpoint_is_evaluated_loaded_and_begun_from(worlds: KeptWorlds, tmp_path: Path) -> None:
    trained = train(worlds[2], DEALT, tmp_path / "run", "--steps", "5", "--ema", "0.9", "--threads", "1")
    for ranks in (1, 3):
        found = worlds[ranks].run(evaluate_here, tmp_path / "run")[0]
        assert found["metrics"]["eval"]["loss"] == pytest.approx(trained["eval"]["loss"], rel=1e-12)
    weights = tmp_path / "run" / "checkpoints" / "step-5"
    begin = ["--init-from", str(weights), "--steps", "4", "--threads", "1", "--ema", "0.5"]
    for ranks in (1, 3):
        train(worlds[ranks], DEALT, tmp_path / str(ranks), *begin)
    assert_same(tmp_path / "1", tmp_path / "3", 1e-12)


def test_tables_are_trained_in_mixed_precision(worlds: KeptWorlds, tmp_path: Path) -> None:
    """The first scale is too large for float16: all ranks skip the steps that they skip with whole tables."""
    options = ["--dtype", "float32", "--amp", "fp16", "--sparse", "--clip-norm", "0.5", "--log-every", "1"]
    for tables in ("whole", "dealt"):
        train(worlds[2], DEALT, tmp_path / tables, "--threads", "1", *options, "--tables", tables)
    whole, dealt = rows(tmp_path / "whole"), rows(tmp_path / "dealt")
    assert [row["loss_scale"] for row in dealt] == [row["loss_scale"] for row in whole]
    assert_same(tmp_path / "whole", tmp_path / "dealt", 1e-6)


def test_replicas_are_compared_without_the_tables(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, DEALT, tmp_path / "run", "--diagnose", "--log-every", "2", "--compression", "int8,min=1")
    assert summary["steps"] == 12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--deterministic"], "--deterministic with Dealt.tables(): gradients of rows are added rank by rank; "),
        (["--shard", "optimizer"], "--shard optimizer with Dealt.tables(): "),
        (["--prune", "0.5,from:1,to:3"], "--prune 0.5,from:1,to:3 with Dealt.tables(): it compares all weights; "),
        (["--local-steps", "2"], "--local-steps 2 with Dealt.tables(): each row is on one rank; leave it out"),
        (["--exchange", "horovod"], "--exchange horovod with Dealt.tables(): "),
        (["--compile"], "--compile with Dealt.tables(): lookups cannot be compiled; "),
        (["--kind", "adafactor"], "Dealt.optimizer: Adafactor does not update each row of a table alone: use SGD"),
        (["--wrong", "norm"], "Wrong.tables() has 'users', whose max_norm changes rows when they are looked up: leave"),
        (["--wrong", "tied"], "Wrong.tables() has 'users', whose weight is that of another module, too: leave"),
        (["--wrong", "linear"], "Wrong.tables() has 'head.0', a Linear, where nn.Embedding or nn.EmbeddingBag"),
        (["--wrong", "several"], "Wrong.score calls a lookup in 'users', which a recipe with several optimizers"),
        (["--wrong", "copy"], "Wrong looks up in a copy of the table 'users', of which no other rank knows"),
        (["--wrong", "decay"], "Wrong.score uses 'users.weight' other than by calling the table, and each rank"),
    ],
)
def test_what_cannot_be_dealt_is_refused_by_name(
    options: list[str], text: str, world2: KeptWorld, tmp_path: Path
) -> None:
    recipe = f"{RECIPES}:Wrong" if options[0] == "--wrong" else DEALT
    found = refusal(world2, recipe, tmp_path / "run", *options)
    assert text in found and "\n" not in found


def test_whole_tables_go_with_all_options(world2: KeptWorld, tmp_path: Path) -> None:
    train(world2, DEALT, tmp_path / "run", "--tables", "whole", "--deterministic", "--steps", "2")
    assert "tables    " not in world2.printed[0]


def test_recommend_comes_near_the_optimum(worlds: KeptWorlds, tmp_path: Path) -> None:
    """In an epoch; in float64, as Adagrad divides gradients by their own size, rounding errors included."""
    options = ("--examples", "24000", "--epochs", "1", "--threads", "1")
    train(worlds[1], PRECISE, tmp_path / "alone", *options)
    for ranks in (2, 3):
        summary = train(worlds[ranks], PRECISE, tmp_path / str(ranks), *options)
        assert_same(tmp_path / "alone", tmp_path / str(ranks), 1e-6)
    assert summary["eval"]["auc_of_optimum"] - 0.05 < summary["eval"]["auc"] < summary["eval"]["auc_of_optimum"]


@pytest.mark.slow
def test_recommend_is_as_good_as_it_says(worlds: KeptWorlds, tmp_path: Path) -> None:
    found = train(worlds[2], RECOMMEND, tmp_path / "run")["eval"]
    assert found["auc_of_optimum"] - 0.015 < found["auc"] < found["auc_of_optimum"]


def write_criteo(path: Path, count: int) -> None:
    """Lines in Criteo's format, some of whose fields are empty."""
    made = torch.Generator().manual_seed(len(path.name))
    lines = []
    for _ in range(count):
        ids = torch.randint(1 << 30, (26,), generator=made).tolist()
        fields = ["-1", "", *map(str, torch.randint(100, (11,), generator=made).tolist())]
        fields += [format(number % 7, "08x") if i else "" for i, number in enumerate(ids)]
        lines.append("\t".join([str(ids[1] % 7 % 2), *fields]))
    path.write_text("\n".join(lines) + "\n")


def test_recommend_reads_the_format_of_criteo(world2: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    found = refusal(world2, RECOMMEND, tmp_path / "none", "--data-dir", str(folder))
    assert f"--data-dir {folder}: expected Criteo's train.txt there" in found
    write_criteo(folder / "train.txt", 400)
    options = ("--data-dir", str(folder), "--batch-size", "16", "--rows", "50", "--epochs", "3", "--lr", "0.1")
    summary = train(world2, RECOMMEND, tmp_path / "one", *options)
    assert summary["eval"]["auc"] > 0.9 and "auc_of_optimum" not in summary["eval"]
    write_criteo(folder / "eval.txt", 64)
    train(world2, RECOMMEND, tmp_path / "two", *options, "--epochs", "1")
    assert "400 examples" in world2.printed[0]
    (folder / "train.txt").write_text("1\t2\n")
    assert "line 1: 2 fields, expected 40" in refusal(world2, RECOMMEND, tmp_path / "three", *options)
