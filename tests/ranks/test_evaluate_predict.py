"""`hvdtrain evaluate` and `hvdtrain predict`: a run's own metrics again, and outputs in the order of the examples."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hvdtrain
from tests.ranks.harness import HVDTRAIN, run
from tests.support.worlds import KeptWorld, KeptWorlds, train

RECIPE = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from hvdtrain.torch import Recipe
import sizes

@dataclass(kw_only=True)
class Mine(Recipe):
    evals = ("eval", "test")
    best = ("accuracy", "max")
    batch_size: int = 8

    def model(self):
        return nn.Sequential(nn.Linear(sizes.N, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))

    def dataset(self, split):
        x = torch.randn(37, sizes.N, generator=torch.Generator().manual_seed(len(split) + ord(split[0])))
        return TensorDataset(x, x[:, :3].argmax(1))

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        x, y = batch
        logits = model(x)
        loss = F.cross_entropy(logits, y, reduction="none")
        return {"loss": loss, "accuracy": (logits.argmax(1) == y).float()}

class Named(Mine):
    best = ("test/accuracy", "max")

    def outputs(self, model, batch):
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return {"probabilities": model(x).softmax(1), "choice": model(x).argmax(1).numpy()}

class Uneven(Mine):
    def outputs(self, model, batch):
        return {"choice": model(batch[0]).mean()}
"""
OPTIONS = ["--steps", "12", "--eval-every", "4", "--checkpoint-every", "4", "--keep", "5"]


def evaluate_here(folder: Path, which: str, split: str | None) -> dict[str, Any]:
    from hvdtrain.training.evaluating import evaluate_run

    return asdict(evaluate_run(folder, which, split, {"threads": 1}, hvdtrain.init()))


def predict_here(folder: Path, source: str | Path, output: Path) -> dict[str, Any]:
    from hvdtrain.training.prediction import PredictionRequest, predict_run

    request = PredictionRequest(folder, "last", source, output, {"threads": 1})
    return asdict(predict_run(request, hvdtrain.init()))


def make_run(world: KeptWorld, folder: Path, *options: str, cls: str = "Mine") -> dict[str, Any]:
    """Train, and remove the recipe."""
    (folder / "own").mkdir(parents=True)
    (folder / "own" / "sizes.py").write_text("N = 4\n")
    (folder / "own" / "mine.py").write_text(RECIPE)
    summary = train(world, f"{folder / 'own' / 'mine.py'}:{cls}", folder / "run", *OPTIONS, *options)
    shutil.rmtree(folder / "own")
    return summary


@pytest.fixture(scope="module")
def named_run(worlds: KeptWorlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    make_run(worlds[2], folder, cls="Named")
    return folder / "run"


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, ["--ema", "0.8"]),
        (2, []),
        (2, ["--micro-batch", "3", "--amp", "bf16"]),
        (2, ["--compression", "topk:0.5", "--workers", "1"]),
    ],
)
def test_the_metrics_are_the_runs_own_to_the_last_digit(
    ranks: int, options: list[str], worlds: KeptWorlds, tmp_path: Path
) -> None:
    summary = make_run(worlds[ranks], tmp_path, *options)
    reports = worlds[ranks].run(evaluate_here, tmp_path / "run", "last", None)
    assert all(report == reports[0] for report in reports)
    assert reports[0]["metrics"] == {"eval": summary["eval"], **summary["evals"]}
    assert (reports[0]["step"], reports[0]["examples"]) == (12, {"eval": 37, "test": 37})


def test_deterministic_runs_have_the_same_metrics_on_any_number_of_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sizes.py").write_text("N = 4\n")
    (tmp_path / "own" / "mine.py").write_text(RECIPE.replace("nn.BatchNorm1d(6)", "nn.Tanh()"))
    path = f"{tmp_path / 'own' / 'mine.py'}:Mine"
    summary = train(worlds[1], path, tmp_path / "run", *OPTIONS, "--deterministic")
    (tmp_path / "own" / "mine.py").write_text("broken (")
    report = worlds[2].run(evaluate_here, tmp_path / "run", "last", None)[0]
    assert report["metrics"] == {"eval": summary["eval"], **summary["evals"]}


def test_one_split_and_the_best_checkpoint_are_evaluated(named_run: Path, world2: KeptWorld) -> None:
    summary = json.loads((named_run / "summary.json").read_text())
    best = world2.run(evaluate_here, named_run, "best", "test")[0]
    assert (best["step"], best["metrics"]["test"]["accuracy"]) == (summary["best"]["step"], summary["best"]["value"])
    last = world2.run(evaluate_here, named_run, "last", "test")[0]
    assert last["metrics"] == summary["evals"]
    recipe, model = hvdtrain.load(named_run, "last")
    with torch.no_grad():
        loss = recipe.score(model, recipe.dataset("train").tensors)["loss"].double().mean()
    found = world2.run(evaluate_here, named_run, "last", "train")[0]["metrics"]["train"]["loss"]
    assert found == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_predictions_are_in_the_order_of_the_examples(
    ranks: int, worlds: KeptWorlds, named_run: Path, tmp_path: Path
) -> None:
    recipe, model = hvdtrain.load(named_run, "last")
    images, labels = (tensor.numpy() for tensor in recipe.dataset("eval").tensors)
    with torch.no_grad():
        expected = {
            key: np.asarray(value) for key, value in recipe.outputs(model, recipe.dataset("eval").tensors).items()
        }
    np.savez(tmp_path / "pairs.npz", images, labels)
    np.savez(tmp_path / "named.npz", x=images.astype(np.float64), y=labels)
    np.savez(tmp_path / "one.npz", x=images[:1])
    lines = "".join(json.dumps({"x": image.tolist()}) + "\n" for image in images)
    (tmp_path / "named.jsonl").write_text(lines)
    for source in ("eval", *(tmp_path / name for name in ("pairs.npz", "named.npz", "named.jsonl", "one.npz"))):
        count = 1 if source == tmp_path / "one.npz" else 37
        report = worlds[ranks].run(predict_here, named_run, source, tmp_path / "out.npz")[0]
        assert report == {"step": 12, "examples": count, "outputs": {"probabilities": (count, 3), "choice": (count,)}}
        found = np.load(tmp_path / "out.npz")
        np.testing.assert_allclose(found["probabilities"], expected["probabilities"][:count], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(found["choice"], expected["choice"][:count])
    worlds[ranks].run(predict_here, named_run, "eval", tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(37))
    assert [row["choice"] for row in rows] == expected["choice"].tolist()


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("evla", "out.npz", "Named has no split 'evla'; did you mean 'eval'?"),
        ("eval", "out.txt", "--output out.txt: expected a file whose name ends in .jsonl or .npz"),
        ("eval", "no/out.npz", "--output no/out.npz: there is no folder no"),
        (Path("no.npy"), "out.npz", "--input no.npy cannot be read: No such file or directory"),
        (Path("in.csv"), "out.npz", "--input in.csv: expected a file whose name ends in .npy, .npz, .jsonl"),
        (Path("bad.jsonl"), "out.npz", "--input bad.jsonl cannot be read: line 2 is not JSON: "),
        (
            Path("rows.npz"),
            "out.npz",
            "--input rows.npz cannot be read: a has 2 rows, b has 3 rows",
        ),
        (Path("empty.npy"), "out.npz", "--input empty.npy has no examples"),
    ],
)
def test_what_cannot_be_predicted_is_refused_by_name_on_all_ranks(
    source: str | Path, output: str, message: str, named_run: Path, world2: KeptWorld, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text("[1]\n[1,\n")
    np.savez(tmp_path / "rows.npz", a=np.zeros(2), b=np.zeros(3))
    np.save(tmp_path / "empty.npy", np.zeros((0, 4)))
    errors = world2.errors(predict_here, named_run, source, Path(output), cwd=tmp_path)
    assert all(str(error).startswith(message) and error.exit_code == 2 for error in errors)
    assert not (tmp_path / "out.npz").exists()


def refusal(world: KeptWorld, *args: Any) -> str:
    (text,) = {str(error) for error in world.errors(*args)}
    return text


def test_outputs_that_do_not_fit_are_named(world2: KeptWorld, tmp_path: Path) -> None:
    make_run(world2, tmp_path / "uneven", cls="Uneven")
    text = refusal(world2, predict_here, tmp_path / "uneven" / "run", "eval", tmp_path / "out.npz")
    assert "Uneven.outputs(): 'choice' is shape () float32 for " in text and "expected an array (B, ...)" in text
    make_run(world2, tmp_path / "plain")
    np.savez(tmp_path / "named.npz", x=np.zeros((5, 4), np.float32))
    text = refusal(world2, predict_here, tmp_path / "plain" / "run", tmp_path / "named.npz", tmp_path / "out.npz")
    assert "a batch of Mine is a dict, and it is not known what of it the model takes: write Mine.outputs" in text
    np.save(tmp_path / "plain.npy", np.zeros((5, 4)))
    report = world2.run(predict_here, tmp_path / "plain" / "run", tmp_path / "plain.npy", tmp_path / "out.npz")[0]
    assert report["outputs"] == {"output": (5, 3)}


def test_a_split_or_a_run_that_is_not_there_is_refused(named_run: Path, world2: KeptWorld, tmp_path: Path) -> None:
    assert (
        refusal(world2, evaluate_here, named_run, "last", "tset") == "Named has no split 'tset'; did you mean 'test'?"
    )
    text = refusal(world2, evaluate_here, tmp_path, "last", None)
    assert text == f"{tmp_path} is not a run folder: it has no config.json"
    assert "has no checkpoint '7'; expected" in refusal(world2, evaluate_here, named_run, "7", None)


def test_the_commands_print_what_they_found(named_run: Path, tmp_path: Path) -> None:
    summary = json.loads((named_run / "summary.json").read_text())
    done = run("horovodrun", 2, [*HVDTRAIN, "evaluate", str(named_run), "--checkpoint", "last", "--json"])
    assert done.returncode == 0, done.stderr
    text = "\n".join(line.partition("[0]<stdout>:")[2] or line for line in done.stdout.splitlines())
    assert json.loads(text[text.index("{") :])["metrics"] == {"eval": summary["eval"], **summary["evals"]}
    output = tmp_path / "out.jsonl"
    command = [*HVDTRAIN, "predict", str(named_run), "--split", "eval", "--output", str(output)]
    done = run("alone", 1, command)
    assert done.returncode == 0 and len(output.read_text().splitlines()) == 37, done.stderr
    assert f"{output}: probabilities (37, 3), choice (37,)  (step " in done.stdout
    done = run("alone", 1, [*HVDTRAIN, "evaluate", str(tmp_path)])
    error = f"hvdtrain: error: {tmp_path} is not a run folder: it has no config.json\n"
    assert (done.returncode, done.stderr) == (2, error)
