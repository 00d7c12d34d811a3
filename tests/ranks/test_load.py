"""`hvdtrain.load`: the recipe and the model of a run, from what its folder keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import hvdtrain
from hvdtrain.system.errors import UserError
from tests.ranks.harness import ROOT
from tests.support.worlds import KeptWorld, train

RECIPE = """
from dataclasses import dataclass, field
import torch
from torch import nn
from torch.utils.data import TensorDataset
from hvdtrain.torch import Recipe, option
import sizes

@dataclass
class Adam:
    beta: float = 0.9

@dataclass(kw_only=True)
class Mine(Recipe):
    widths: tuple[int, ...] = (3,)
    adam: Adam = field(default_factory=Adam)
    batch_size: int = 8
    lr: float = 0.01

    def model(self):
        from sizes import OUT
        inner = [nn.Linear(sizes.N, self.widths[0]), nn.Dropout(0.5), nn.Linear(self.widths[0], OUT)]
        return nn.Sequential(*inner)

    def dataset(self, split):
        generator = torch.Generator().manual_seed(len(split))
        x = torch.randn(20, sizes.N, generator=generator)
        return TensorDataset(x, x.sum(1))

    def optimizer(self, params):
        return torch.optim.Adam(params, lr=self.lr, betas=(self.adam.beta, 0.99))

    def score(self, model, batch):
        x, y = batch
        return {"loss": (model(x).squeeze(1) - y).square()}
"""


def write_recipe(folder: Path) -> Path:
    folder.mkdir()
    (folder / "sizes.py").write_text("N, OUT = 4, 1\n")
    path = folder / "mine.py"
    path.write_text(RECIPE)
    return path


def evaluate(recipe: Any, model: torch.nn.Module) -> float:
    batch = recipe.dataset("eval").tensors
    with torch.no_grad():
        return float(recipe.score(model, batch)["loss"].double().mean())


@pytest.fixture(scope="module")
def run(world1: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 9 steps, whose recipe's files are gone."""
    folder = tmp_path_factory.mktemp("loaded")
    path = write_recipe(folder / "own")
    options = ["--steps", "9", "--widths", "5", "--adam.beta", "0.8", "--eval-every", "3", "--checkpoint-every", "3"]
    train(world1, str(path), folder / "run", *options, "--keep", "5")
    shutil.rmtree(folder / "own")
    return folder / "run"


def test_a_run_is_loaded_after_its_recipe_is_gone(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    before = torch.get_rng_state()
    recipe, model = hvdtrain.load(run)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert (recipe.widths, recipe.adam.beta, recipe.lr) == ((5,), 0.8, 0.01)
    assert evaluate(recipe, model) == pytest.approx(summary["best"]["value"], rel=1e-6)
    last = hvdtrain.load(str(run), "last")[1]
    assert evaluate(recipe, last) == pytest.approx(summary["eval"]["loss"], rel=1e-6)
    state = torch.load(run / "checkpoints" / "step-3" / "state", weights_only=True)["model"]
    assert all(torch.equal(value, state[name]) for name, value in hvdtrain.load(run, 3)[1].state_dict().items())


def test_a_loaded_source_neither_uses_nor_hides_modules_of_the_same_names(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = types.ModuleType("sizes")
    own.N = own.OUT = 99  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sizes", own)
    recipe, model = hvdtrain.load(run)
    assert model[0].in_features == 4 and model[2].out_features == 1
    assert recipe.model()[2].out_features == 1  # which imports in a function
    assert sys.modules["sizes"] is own and "mine" not in sys.modules
    assert type(hvdtrain.load(run)[0]) is type(recipe)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (4, r"{run} has no checkpoint 4; expected 'best', 'last', or a step of 3, 6, 9"),
        ("bset", r"{run} has no checkpoint 'bset'; expected 'best', 'last', or a step of 3, 6, 9"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(which: Any, message: str, run: Path) -> None:
    with pytest.raises(UserError) as refused:
        hvdtrain.load(run, which)
    assert str(refused.value) == message.replace("{run}", str(run))


def test_what_is_no_run_or_was_changed_is_refused(run: Path, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(UserError) as refused:
            hvdtrain.load(copy, "last")
        return str(refused.value).replace(str(copy), "RUN")

    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.json"):
        hvdtrain.load(tmp_path)
    cls = type(hvdtrain.load(run)[0])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    state = copy / "checkpoints" / "step-9" / "state"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    assert refusal() == "RUN/checkpoints/step-9 is damaged: the checksum of its state is wrong"
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "class": "f.<locals>.Mine"}))
    assert "Mine is defined in a function" in refusal()
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "source" / "mine.py").write_text("1 / 0\n")
    assert refusal() == "RUN/source/mine.py:1 cannot be imported: ZeroDivisionError: division by zero"
    (copy / "source" / "mine.py").write_text("import hvdtrain\nhvdtrain.fit(None)\n")
    assert refusal().startswith("RUN/source/mine.py calls hvdtrain.fit when it is imported: put what it runs under")
    shutil.rmtree(copy / "source")
    assert refusal().startswith("RUN has no source/: the run's recipe was in no file, as in a notebook")
    assert type(hvdtrain.load(copy, 3, cls=cls)[0]) is cls


def test_a_run_of_an_earlier_hvdtrain_is_loaded(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy", symlinks=True)
    config = json.loads((run / "config.json").read_text())
    flat = {"adam.beta" if key == "adam" else key: 0.8 if key == "adam" else v for key, v in config["recipe"].items()}
    (tmp_path / "copy" / "config.json").write_text(json.dumps({"recipe": "mine", "options": {**flat, **config["run"]}}))
    recipe, _ = hvdtrain.load(tmp_path / "copy")
    assert type(recipe).__name__ == "Mine" and recipe.widths == (5,)


def test_the_averaged_weights_are_loaded_with_ema(world1: KeptWorld, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "own")
    summary = train(world1, str(path), tmp_path / "run", "--steps", "5", "--ema", "0.5")
    path.write_text("raise SystemExit(3)\n")
    assert evaluate(*hvdtrain.load(tmp_path / "run")) == pytest.approx(summary["eval"]["loss"], rel=1e-6)


def test_a_script_that_trains_loads_its_own_run_without_running_again(tmp_path: Path) -> None:
    write_recipe(tmp_path / "own")
    script = tmp_path / "own" / "script.py"
    script.write_text(
        f"{RECIPE}\nimport hvdtrain\nprint('once')\nhvdtrain.fit(Mine(), steps=2, run_dir='run', quiet=True)\n"
        "recipe, model = hvdtrain.load('run')\nassert type(recipe) is Mine\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path / "own",
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stdout.count("once")) == (0, 1), done.stderr
