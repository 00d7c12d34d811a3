"""`hvdtrain.fit(recipe, ranks=2)`: from a notebook in a real Jupyter kernel, and from scripts."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path

import pytest

import hvdtrain
from hvdtrain.system.errors import UserError
from tests.ranks.exact_recipe import Exact
from tests.ranks.harness import ROOT, run
from tests.support.limits import stretch
from tests.support.worlds import on_ranks

SCRIPT = """
import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hvdtrain
from hvdtrain.torch import Recipe
from tests.ranks.exact_recipe import Exact

BIAS = {"bias": False}


def inputs():
    return torch.arange(32.0).reshape(16, 2) / 32


@dataclass(kw_only=True)
class Mine(Recipe):
    fails_at: int = -1
    sizes: tuple[int, ...] = (1,)
    epochs: int = 2
    batch_size: int = 8

    def model(self):
        return nn.Linear(2, *self.sizes, **BIAS)

    def dataset(self, split):
        return TensorDataset(inputs())

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        if (self.now.step, self.now.rank) == (self.fails_at, 1):
            raise ValueError("planted")
        return {"loss": model(batch[0]).square().sum(1)}
"""
KEYS = ("steps", "world_size", "finished", "recipe")


def read_output(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_notebook_trains_on_ranks_fails_by_name_and_can_be_interrupted(tmp_path: Path, monkeypatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    new_cell = nbformat.v4.new_code_cell
    imports, helper, recipe = SCRIPT.split("\n\n\n")
    cells = [
        *map(new_cell, (imports, helper, recipe)),
        new_cell("s = hvdtrain.fit(Mine(sizes=(3,)), ranks=2, steps=4, lr=0.01)\nprint([s[k] for k in " + f"{KEYS}])"),
        new_cell("hvdtrain.fit(Mine(fails_at=2), ranks=2, steps=4, run_dir='failed')"),
        new_cell("s = hvdtrain.fit(Mine(), ranks=2, epochs=10**6, run_dir='long', log_every=1)\nprint(s['finished'])"),
        new_cell("data = torch.ones(3)\ndata[0] = 2\nclass Uses(Mine):\n    def model(self): return data\n"),
        new_cell("hvdtrain.fit(Uses(), ranks=2, run_dir='refused')"),
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3", allow_errors=True)
    rows = tmp_path / "long" / "metrics.jsonl"

    def interrupt() -> None:
        deadline = time.monotonic() + stretch(60)
        while time.monotonic() < deadline and not (rows.exists() and rows.read_text().count("\n") > 3):
            time.sleep(0.05)
        interrupted = client.km.interrupt_kernel()
        if asyncio.iscoroutine(interrupted):
            asyncio.run(interrupted)

    with client.setup_kernel(cwd=str(tmp_path)):
        for number, cell in enumerate(cells):
            if "long" in cell.source:
                threading.Thread(target=interrupt, daemon=True).start()
            client.execute_cell(cell, number)
    trained, failed, stopped, refused = cells[3], cells[4], cells[5], cells[7]
    assert "[4, 2, True, 'mine']" in read_output(trained)
    error = failed.outputs[-1]
    assert (error.ename, error.evalue.partition(" failed: ")[2]) == (
        "RecipeError",
        "Mine.score() raised ValueError: planted",
    )
    assert error.evalue.startswith("rank 1 on ") and 'source/mine.py", line' in read_output(failed)
    assert "False" in read_output(stopped).splitlines()
    assert json.loads((tmp_path / "long" / "summary.json").read_text())["finished"] is False
    assert refused.outputs[-1].ename == "UserError" and "Uses uses data" in refused.outputs[-1].evalue
    assert not (tmp_path / "refused").exists()
    (folder,) = (tmp_path / "runs").iterdir()
    assert "def inputs" in (folder / "source" / "mine.py").read_text()
    assert json.loads((folder / "config.json").read_text())["recipe"]["sizes"] == [3]


@pytest.mark.timeout(300)
def test_a_script_without_a_guard_and_a_recipe_of_a_file(tmp_path: Path) -> None:
    """The ranks do not run the script; of a recipe that is imported they import the file."""
    text = SCRIPT + (
        "\nsummary = hvdtrain.fit(Mine(lr=0.01), hosts='localhost:2', steps=4, run_dir='mine')\n"
        f"print([summary[k] for k in {KEYS}])\n"
        "options = {'steps': 4, 'compression': 'none', 'eval_every': 4}\n"
        "two = hvdtrain.fit(Exact(lr=0.002), ranks=2, run_dir='two', **options)\n"
        "one = hvdtrain.fit(Exact(lr=0.002), run_dir='one', **options)\n"
        "assert abs(two['train_loss'] - one['train_loss']) < 1e-12, (one, two)\n"
        "print('same', two['recipe'], two['world_size'])\n"
        "try:\n    hvdtrain.fit(Mine(), ranks=2, run_dir='mine')\n"
        "except hvdtrain.UserError as error:\n    print(error)\n"
        "print(hvdtrain.fit(Mine(lr=0.01), ranks=2, steps=6, run_dir='mine', resume=True)['resumed_from'])\n"
        "print(type(hvdtrain.load('mine', 'last')[0]).__name__)\n"
    )
    (tmp_path / "script.py").write_text(text)
    done = run("alone", 1, [sys.executable, "script.py"], cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "[4, 2, True, 'mine']",
        "same exact_recipe:Exact 2",
        "run folder mine already holds a run: add --resume to continue it, or choose another --run-dir",
        "4",
        "Mine",
    ):
        assert line in done.stdout.splitlines(), done.stdout + done.stderr
    assert done.stdout.count("hvdtrain: starting 2 ranks") == 3


@on_ranks(2)
def test_a_rank_starts_no_ranks() -> None:
    with pytest.raises(UserError, match=r"fit\(ranks=2\) .* is rank \d of a launch already: leave ranks out"):
        hvdtrain.fit(Exact(), ranks=2)


def test_what_cannot_start_ranks_is_refused_by_name(tmp_path: Path) -> None:
    class Local(Exact):
        pass

    cases = (
        ({"ranks": 0}, r"fit\(ranks=0\): expected a number of ranks, 1 or more"),
        ({"ranks": "2"}, r"fit\(ranks='2'\): expected a number of ranks"),
        ({"ranks": 2, "comm": object()}, r"fit\(ranks=\.\.\.\) starts ranks, and comm names processes"),
        ({"ranks": 2, "widht": 3}, "fit has no option 'widht'"),
        ({"ranks": 3, "hosts": "a:1"}, "3"),
    )
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            hvdtrain.fit(Exact(), run_dir=tmp_path / "new", **options)
    with pytest.raises(UserError, match="Local is not at the top of a file"):
        hvdtrain.fit(Local(), ranks=2, run_dir=tmp_path / "new")
    errors: list[BaseException] = []

    def call() -> None:
        try:
            hvdtrain.fit(Exact(), ranks=2, run_dir=tmp_path / "new")
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "call it in the main thread" in str(errors[0])
    assert not (tmp_path / "new").exists()
