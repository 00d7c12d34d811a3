"""The recipe's source in the run folder, and a resume after the recipe was edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import hvdtrain
from hvdtrain.cli.train import load_arguments
from hvdtrain.elastic.membership import FixedMembership
from hvdtrain.recipe.source import read_source
from hvdtrain.recipe.source_copy import RecipeCopy, describe_copy, read_copy, read_files, write_copy
from hvdtrain.system.errors import UserError
from hvdtrain.system.records import encode_record, parse_record
from hvdtrain.training.fit import fit_from_command_line

RECIPE = """
from dataclasses import dataclass
import sizes
import torch
from torch import nn
from torch.utils.data import TensorDataset
from hvdtrain.torch import Recipe, option

@dataclass(kw_only=True)
class Mine(Recipe):
    epochs: int = 4
    batch_size: int = 8
    old: float = 3.0

    def model(self):
        return nn.Sequential(nn.Linear(4, sizes.N), nn.Tanh(), nn.Linear(sizes.N, 1))

    def dataset(self, split):
        x = torch.arange(160.0).reshape(40, 4) / 160 + self.shift()
        return TensorDataset(x, x.sum(1))

    def shift(self):
        return 0

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def score(self, model, batch):
        x, y = batch
        return {"loss": (model(x)[:, 0] - y) ** 2}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "sizes.py").write_text("N = 4\n")
    (tmp_path / "mine.py").write_text(RECIPE)
    return tmp_path / "mine.py"


def train(path: Path, *options: str) -> float:
    """Train in this process and return the last training loss."""
    arguments = load_arguments([str(path), "--run-dir", str(path.parent / "run"), "--threads", "1", *options])
    summary = fit_from_command_line(
        arguments.recipe_class, arguments.name, arguments.given_options, hvdtrain.init(), FixedMembership()
    )
    return summary.train_loss


def test_the_run_folder_holds_the_file_and_what_it_imports(mine: Path) -> None:
    train(mine, "--steps", "2")
    assert read_files(mine.parent / "run" / "source") == {
        "mine.py": mine.read_bytes(),
        "sizes.py": (mine.parent / "sizes.py").read_bytes(),
    }


def test_a_resume_after_an_edit_says_so_and_keeps_both(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(mine, "--steps", "2")
    before = mine.read_bytes()
    train(mine, "--resume", "--steps", "3")
    assert "changed since" not in capsys.readouterr().out
    mine.write_text(RECIPE.replace("** 2", "** 4"))
    train(mine, "--resume", "--steps", "4")
    run = mine.parent / "run"
    line = f"source    mine.py has changed since this run began; what it began with is in {run / 'source-1'}\n"
    assert line in capsys.readouterr().out
    assert (run / "source-1" / "mine.py").read_bytes() == before
    assert (run / "source" / "mine.py").read_bytes() == mine.read_bytes()
    (mine.parent / "sizes.py").write_text("N = 2 + 2\n")
    train(mine, "--resume", "--steps", "5")
    assert "source    sizes.py has changed since" in capsys.readouterr().out
    assert (run / "source-2" / "sizes.py").read_text() == "N = 4\n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("N = 4", "N = 5", "size mismatch for '0.weight': (4, 4) float32 in it, (5, 4) float32 in this run"),
        ("nn.Tanh(), nn.Linear(sizes.N, 1)", "nn.Linear(sizes.N, 1)", "it has no '1.weight', which is (1, 4) float32"),
        (
            "nn.Linear(sizes.N, 1))",
            "nn.Linear(sizes.N, 1, bias=False))",
            "it has '2.bias' (1,) float32, which this run",
        ),
    ],
)
def test_a_resume_is_refused_if_parameters_differ(mine: Path, old: str, new: str, message: str) -> None:
    train(mine, "--steps", "2")
    for path in (mine, mine.parent / "sizes.py"):
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError) as refused:
        train(mine, "--resume", "--steps", "3")
    assert str(refused.value).startswith(f"the checkpoint is of another model or optimizer: {message}")
    assert not (mine.parent / "run" / "source-1").exists()


def test_parameters_are_matched_by_name(mine: Path) -> None:
    """Layers in another order after an edit go on with their own state."""
    text = RECIPE.replace(
        "nn.Sequential(nn.Linear(4, sizes.N), nn.Tanh(), nn.Linear(sizes.N, 1))",
        "nn.ModuleDict({k: nn.Linear(4, 1) for k in NAMES})",
    ).replace("model(x)", "sum(model[k](x) * i for i, k in enumerate('abc', 1))")
    text = text.replace("lr=self.lr,", "lr=0.01,")
    mine.write_text(text.replace("@dataclass", "NAMES = 'abc'\n@dataclass", 1))
    train(mine, "--steps", "7")
    expected = train(mine, "--resume", "--steps", "10")
    (mine.parent / "run").rename(mine.parent / "first")
    train(mine, "--steps", "7")
    mine.write_text(text.replace("@dataclass", "NAMES = 'cab'\n@dataclass", 1))
    assert train(mine, "--resume", "--steps", "10") == pytest.approx(expected, rel=1e-6)


def test_other_examples_in_mid_epoch_are_refused(mine: Path) -> None:
    train(mine, "--steps", "2")
    mine.write_text(RECIPE.replace("return 0", "return 1"))
    with pytest.raises(UserError) as refused:
        train(mine, "--resume", "--steps", "3")
    assert str(refused.value) == (
        "cannot resume at example 16 of an epoch: dataset('train')[0] is another example now; resume with the same "
        "data in the same order, or from a checkpoint at the end of an epoch"
    )


def test_other_examples_after_an_epoch_are_trained(mine: Path) -> None:
    train(mine, "--steps", "5")
    mine.write_text(RECIPE.replace("return 0", "return 1"))
    train(mine, "--resume", "--steps", "6")


def test_resume_names_the_old_field_in_config_json(mine: Path) -> None:
    train(mine, "--steps", "2", "--old", "4")
    mine.write_text(RECIPE.replace("old: float", "older: float"))
    with pytest.raises(UserError) as refused:
        train(mine, "--resume")
    path = mine.parent / "run" / "config.json"
    assert str(refused.value) == (
        f"{path} has the option 'old', which Mine does not have: rename or remove it there as in the recipe; "
        "did you mean 'older'?"
    )
    path.write_text(json.dumps(json.loads(path.read_text().replace('"old": 4.0', '"older": "x"'))))
    with pytest.raises(UserError) as refused:
        train(mine, "--resume")
    assert str(refused.value) == f"{path}: --older: 'x' is str; expected float"


def test_a_copy_is_imported_as_the_original(mine: Path, tmp_path: Path) -> None:
    source = read_source(mine)
    assert write_copy(tmp_path, source) is None
    described = parse_record(json.loads(json.dumps(encode_record(describe_copy(tmp_path, source)))), RecipeCopy)
    mine.write_text("def broken(:")
    (mine.parent / "sizes.py").unlink()
    copy = read_copy(described)
    assert copy is not None and copy.files == source.files and copy.main_path == mine
    cls = load_arguments([str(mine)], copy).recipe_class
    assert cls.__name__ == "Mine" and cls().model()[0].weight.shape == (4, 4)  # type: ignore[attr-defined]
    (tmp_path / "source" / "mine.py").write_text("tampered")
    assert read_copy(described) is None
