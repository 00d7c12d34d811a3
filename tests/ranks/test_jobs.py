"""The 22 jobs that practitioners bring, by the recipes of docs/how-to.md: two ranks train as one does.

    data         token mean, padding: letters; images, augmentation: pictures; streams: lines, stream; balanced classes:
                 balanced; reinforcement learning: bandit
    model        freezing: unfrozen; weights to start from: options; checkpointing: recomputed; distillation: student;
                 negatives of all ranks: contrast; batch norm over ranks: normed; tasks with few labels: tasks
    optimizer    GAN: gan; groups: decay; early stopping, plateau: enough, options; a schedule of one's own: sawtooth
    results      F1, AUC: scored; pictures: drawn; trackers: tracked; prediction: predictions
    options      search: study; files: options

torch.compile is run by tests/ranks/test_options.py.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hvdtrain
from tests.ranks.harness import ROOT, rows
from tests.support.pages import read_blocks, read_files, write_file
from tests.support.worlds import KeptWorlds, refusal, train

HOW_TO = ROOT / "docs" / "how-to.md"
TIMES = ("seconds", "per_second", "mfu")  # what columns of speed have in their names
EPOCH = 12  # steps of mine.py

# By recipe: options, and the columns of an evaluation that it must have.
RECIPES = {
    "letters.py": (["--micro-batch", "5"], ["loss", "perplexity"]),
    "pictures.py": (["--epochs", "1", "--batch-size", "8"], ["accuracy"]),
    "lines.py:FileLetters": (["--epochs", "1"], ["perplexity"]),
    "stream.py:Streamed": (["--epochs", "1"], ["perplexity"]),
    "balanced.py": (["--epochs", "1"], ["accuracy"]),
    "bandit.py": ([], ["reward"]),
    "sets.py:TwoSets": (["--epochs", "1"], ["accuracy"]),
    "unfrozen.py": (["--epochs", "2", "--diagnose", "--checkpoint-every", "6", "--keep", "9"], ["accuracy"]),
    "tasks.py": (["--epochs", "2", "--micro-batch", "40"], ["accuracy", "parity"]),
    "student.py": (["--epochs", "1"], ["accuracy"]),
    "contrast.py": (["--epochs", "1"], ["loss"]),
    "normed.py": (["--epochs", "1"], ["accuracy"]),
    "recomputed.py": (["--epochs", "1"], ["accuracy"]),
    "decay.py": (["--epochs", "1", "--lr", "0.003"], ["accuracy"]),
    "gan.py:Gan": (["--epochs", "2"], ["fooled", "loss_d", "loss_g"]),
    "sawtooth.py": (["--epochs", "1"], ["accuracy"]),
    "enough.py:Enough": ([], ["accuracy"]),
    "enough.py:Falling": (["--epochs", "3", "--lr", "2"], ["accuracy"]),
    "scored.py": (["--epochs", "2"], ["f1", "auc"]),
    "drawn.py": (["--epochs", "1"], ["accuracy"]),
    "tracked.py": (["--epochs", "1"], ["accuracy"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, worlds: KeptWorlds) -> Path:
    """The files of the page, and what they need: pictures, stand-ins for trackers, a run of mine.py in runs/first."""
    folder = tmp_path_factory.mktemp("jobs")
    for name, text in read_files(HOW_TO).items():
        write_file(name, text, folder)
    write_pictures(folder / "pictures")
    write_file("traps.py", TRAPS, folder)
    write_file("wandb.py", FAKE_WANDB, folder)
    write_file("optuna.py", FAKE_OPTUNA, folder)
    train(worlds[2], str(folder / "mine.py"), folder / "runs" / "first", "--steps", "24", cwd=folder)
    return folder


def write_pictures(folder: Path) -> None:
    from PIL import Image

    values = np.random.default_rng(0)
    for split, count in (("train", 9), ("eval", 5)):
        for name in ("cats", "dogs"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = values.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


TRAPS = """
import torch
from torch import nn
from torch.utils.data import IterableDataset
from mine import Mine

class Scheduled(Mine):
    def optimizer(self, params):
        optimizer = super().optimizer(params)
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=24)
        return optimizer

class LocalNorm(Mine):
    def model(self):
        return nn.Sequential(*super().model(), nn.SyncBatchNorm(10))

class Unsized(Mine):
    def dataset(self, split):
        return type("Lines", (IterableDataset,), {"__iter__": lambda self: iter([])})()

class Hooked(Mine):
    calls = 0

    def optimizer(self, params):
        optimizer = super().optimizer(params)
        optimizer.register_step_post_hook(self.count)
        return optimizer

    def count(self, *_):
        self.calls += 1

    def evaluated(self, model, metrics):
        assert self.calls == self.now.step

class Taught(Mine):
    def model(self):
        student = super().model()
        student.teacher = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(64, affine=False)).eval()
        return student

    def score(self, model, batch):
        assert not model.teacher.training
        return super().score(nn.Sequential(*list(model)[:3]), batch)
"""

FAKE_WANDB = """
import json
from pathlib import Path

class Run:
    def __init__(self, **given):
        self.file = Path(f"wandb-{given['id']}")

    def log(self, row, step):
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\\n")

init = Run
"""

FAKE_OPTUNA = """
from pathlib import Path

class Trial:
    def __init__(self, number):
        self.number, self.reports = number, []

    def suggest_float(self, name, low, high, log):
        return [0.01, 0.1, 0.3][self.number]

    def report(self, value, step):
        self.reports.append((step, value))

    def should_prune(self):
        return self.number == 0

class Study:
    def __init__(self):
        self.trials = []

    def ask(self):
        self.trials.append(Trial(len(self.trials)))
        return self.trials[-1]

    def tell(self, trial, value):
        with Path("told").open("a") as file:
            file.write(f"{trial.number} {trial.reports[-1][0]} {trial.reports[-1][1] == value}\\n")

def create_study(direction):
    return Study()
"""


def train_on_one_and_two(
    worlds: KeptWorlds, folder: Path, recipe: str, run: Path, *options: str, more_on_two: Sequence[str] = ()
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train on two ranks and on one, which must have the same rows; return the summary and the rows of two."""
    options = ("--log-every", "1", *options)
    train(worlds[1], str(folder / recipe), run / "one", *options, cwd=folder)
    summary = train(worlds[2], str(folder / recipe), run / "two", *options, *more_on_two, cwd=folder)
    one, two = rows(run / "one"), rows(run / "two")
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not any(part in name for part in TIMES):
                right = value if value is None else pytest.approx(value, rel=1e-3, abs=3e-3)
                assert found[name] == right, (name, found["step"])
    return summary, two


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_train_as_one(recipe: str, worlds: KeptWorlds, folder: Path, tmp_path: Path) -> None:
    options, metrics = RECIPES[recipe]
    workers = ["--workers", "1"] if recipe == "pictures.py" else []
    summary, found = train_on_one_and_two(worlds, folder, recipe, tmp_path, *options, more_on_two=workers)
    assert summary["eval"].keys() >= {"loss", *metrics} or "loss_d" in metrics
    assert summary["finished"]
    check = CHECKS.get(recipe.partition(".")[0])
    if check is not None:
        check(folder, tmp_path / "two", summary, found)


def test_every_recipe_of_the_page_is_trained() -> None:
    named = {block.file for block in read_blocks(HOW_TO) if block.is_recipe}
    assert named == {recipe.partition(":")[0] for recipe in RECIPES} | {"study.py"}


Rows = list[dict[str, Any]]


def check_letters(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    """The perplexity is that of the mean over all letters of the evaluation, by a loop over words."""
    recipe, model = hvdtrain.load(run, "last")
    sums = torch.zeros(2, dtype=torch.float64)
    for word in recipe.dataset("eval"):
        losses = torch.nn.functional.cross_entropy(model(word[None, :-1])[0], word[1:], reduction="none")
        sums += torch.tensor([losses.sum().item(), len(losses)], dtype=torch.float64)
    assert summary["eval"]["perplexity"] == pytest.approx((sums[0] / sums[1]).exp().item(), rel=1e-5)


def check_unfrozen(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    """The first layer does not change in the first epoch, and changes in the second, on both ranks alike."""
    early, first, second = (hvdtrain.load(run, step)[1][0].weight for step in (EPOCH // 2, EPOCH, 2 * EPOCH))
    assert torch.equal(early, first) and not torch.equal(first, second)
    assert not json.loads((run / "diagnose.json").read_text())["drift"]


def check_gan(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    """The networks learn in turns, each at a rate of its own."""
    assert {"lr_d", "lr_g"} <= found[0].keys()


def check_sawtooth(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    assert [row["lr"] for row in found[:3]] == pytest.approx([0.1, 0.1 * 23 / 24, 0.1 * 22 / 24])


def check_enough(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    """Falling has so high a learning rate that its loss rises."""
    assert summary["steps"] < 20 * EPOCH and (summary["eval"]["accuracy"] >= 0.9 or found[0]["lr"] > 0.1)


def check_scored(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    """F1 and AUC are scikit-learn's."""
    from sklearn.metrics import f1_score, roc_auc_score

    recipe, model = hvdtrain.load(run, "last")
    images, labels = recipe.dataset("eval")[:]
    with torch.no_grad():
        logits = model(images)
    assert summary["eval"]["f1"] == pytest.approx(f1_score(labels == 0, logits.argmax(1) == 0))
    assert summary["eval"]["auc"] == pytest.approx(roc_auc_score(labels == 0, logits.softmax(1)[:, 0]))
    assert summary["best"]["metric"] == "auc"


def check_bandit(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    assert summary["eval"]["reward"] > 0.7  # 1/3 by chance


def check_drawn(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    assert b"filters" in b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())


def check_tracked(folder: Path, run: Path, summary: dict[str, Any], found: Rows) -> None:
    tracked = [json.loads(line) for line in (folder / f"wandb-{run.name}").read_text().splitlines()]
    assert [row["step"] for row in tracked] == [row["step"] for row in found]


CHECKS = {
    name.removeprefix("check_"): function for name, function in list(globals().items()) if name.startswith("check_")
}


def test_rollouts_refuse_loader_processes(worlds: KeptWorlds, folder: Path, tmp_path: Path) -> None:
    text = refusal(worlds[2], str(folder / "bandit.py"), tmp_path / "run", "--workers", "1", cwd=folder)
    assert "Rollouts" in text and "--workers" in text


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ("Scheduled", "scheduler"),
        ("LocalNorm", "is a torch.nn.SyncBatchNorm, which needs torch.distributed"),
        ("Unsized", "hvdtrain.data.Stream"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(
    recipe: str, text: str, worlds: KeptWorlds, folder: Path, tmp_path: Path
) -> None:
    assert text in refusal(worlds[2], str(folder / f"traps.py:{recipe}"), tmp_path / "run", cwd=folder)


@pytest.mark.parametrize("recipe", ["Hooked", "Taught"])
def test_what_was_silently_wrong_is_right(recipe: str, worlds: KeptWorlds, folder: Path, tmp_path: Path) -> None:
    """Hooks of the optimizer are called once a step; a frozen part of the model stays in evaluation mode."""
    train(worlds[2], str(folder / f"traps.py:{recipe}"), tmp_path / "run", "--epochs", "1", cwd=folder)


def test_options_that_end_change_and_begin_a_training(worlds: KeptWorlds, folder: Path, tmp_path: Path) -> None:
    """--init-from, --config, --patience and a plateau, on two ranks as on one."""
    weights = str(folder / "runs" / "first" / "checkpoints" / "best" / "state")
    options = ["--config", str(folder / "wide.toml"), "--width", "64", "--init-from", weights]
    options += ["--epochs", "6", "--lr", "1e-6", "--patience", "3", "--schedule", "plateau:1 x0.5"]
    summary, found = train_on_one_and_two(worlds, folder, "mine.py", tmp_path, *options)
    assert found[0]["loss"] < 2.0 and summary["steps"] == 4 * EPOCH  # the first evaluation is the best
    assert found[-1]["lr"] < found[0]["lr"]
    assert json.loads((tmp_path / "two" / "config.json").read_text())["run"]["clip_norm"] == 1.0


def test_predictions_on_two_ranks_are_those_of_one_process(worlds: KeptWorlds, folder: Path) -> None:
    run, output = str(folder / "runs" / "first"), folder / "labels.npz"
    worlds[2].run(run_hvdtrain, ["predict", run, "--split", "eval", "--output", str(output)], cwd=folder)
    recipe, model = hvdtrain.load(run)
    with torch.no_grad():
        expected = model(recipe.dataset("eval").tensors[0])
    (found,) = np.load(output).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def run_hvdtrain(arguments: list[str]) -> None:
    from hvdtrain.cli.main import main

    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code


def test_optuna_searches_on_two_ranks(worlds: KeptWorlds, folder: Path) -> None:
    worlds[2].run(run_script, str(folder / "study.py"), cwd=folder)
    assert (folder / "told").read_text() == "0 12 True\n1 36 True\n2 36 True\n"


def run_script(path: str) -> None:
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")
