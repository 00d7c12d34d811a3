"""`--init-from`: a new run begins with the weights of a file, or is refused with what does not fit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdtrain.system.errors import UserError
from hvdtrain.torch.initial_weights import explain_prefix, match_weights, read_weights
from tests.support.worlds import KeptWorld, refusal, train

RECIPE = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
from hvdtrain.torch import Recipe

@dataclass(kw_only=True)
class Mine(Recipe):
    width: int = 3
    batch_size: int = 8
    lr: float = 0.0

    def model(self):
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, self.width))

    def dataset(self, split):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, x)

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def score(self, model, batch):
        return {"loss": model(batch[0]).square().mean(1)}
"""
DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        data = tensor.contiguous().numpy().tobytes()
        places = [len(body), len(body) + len(data)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}  # type: ignore[dict-item]
        body += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    from torch import nn

    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).state_dict()


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(RECIPE)
    return str(tmp_path / "mine.py")


def saved_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run_dir / "checkpoints" / "step-1" / "state", weights_only=True)
    return {name: value for name, value in state["model"].items() if name.startswith(("0.", "2."))}


def same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in found.items())


def test_files_of_each_kind_are_where_a_run_begins(
    recipe: str, weights: dict[str, torch.Tensor], world2: KeptWorld, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "plain.pt")
    write_safetensors(tmp_path / "weights.safetensors", weights)
    train(world2, recipe, tmp_path / "first", "--steps", "1", "--init-from", str(tmp_path / "plain.pt"), "--ema", "0.5")
    assert f"weights   9 tensors from {tmp_path / 'plain.pt'}" in world2.printed[0]
    assert same_weights(saved_weights(tmp_path / "first"), weights)
    for number, path in enumerate((tmp_path / "weights.safetensors", tmp_path / "first" / "checkpoints" / "best")):
        run = tmp_path / f"run{number}"
        train(world2, recipe, run, "--steps", "1", "--seed", "5", "--init-from", str(path))
        assert same_weights(saved_weights(run), weights)
    summary = train(world2, recipe, run, "--resume", "--steps", "2", "--init-from", str(tmp_path / "gone.pt"))
    assert summary["resumed_from"] == 1
    assert f"weights   of the checkpoint; --init-from {tmp_path / 'gone.pt'} is not read" in world2.printed[0]


def test_what_does_not_fit_is_refused_with_names_and_counts_or_left_out(
    recipe: str, weights: dict[str, torch.Tensor], world2: KeptWorld, tmp_path: Path
) -> None:
    path = tmp_path / "odd.pt"
    others = {name: value for name, value in weights.items() if not name.startswith("1.")}
    torch.save({"state_dict": {**others, "head.weight": torch.zeros(3)}}, path)
    text = refusal(world2, recipe, tmp_path / "run", "--steps", "1", "--init-from", str(path), "--width", "2")
    problems = (
        "5 missing ('1.weight', '1.bias', '1.running_mean' and 2 more), 1 extra ('head.weight'), 2 of another shape or "
        "type ('2.weight': (3, 5) float32 in it, (2, 5) float32 in the model, '2.bias': (3,) float32 in it, (2,) "
        "float32 in the model)"
    )
    assert text == f"--init-from {path} does not fit the model: {problems}; --init-partial loads the other 2"
    options = ["--steps", "1", "--init-from", str(path), "--width", "2", "--init-partial"]
    train(world2, recipe, tmp_path / "partial", *options)
    assert f"weights   2 tensors from {path}; left out: {problems}" in " ".join(world2.printed[0].split("\n"))
    found = saved_weights(tmp_path / "partial")
    assert torch.equal(found["0.weight"], weights["0.weight"]) and found["2.weight"].shape == (2, 5)
    torch.save({"other": torch.zeros(3)}, path)
    text = refusal(world2, recipe, tmp_path / "none", "--init-from", str(path), "--init-partial")
    assert text.startswith(f"--init-from {path} does not fit the model: 9 missing ") and "loads" not in text
    assert refusal(world2, recipe, tmp_path / "none2", "--init-partial").startswith("--init-partial needs --init-from")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pt", None, "cannot be read: No such file or directory"),
        ("text.pt", b"hello", "is not a state dict of tensors alone|cannot be read: "),
        ("short.safetensors", b"123", "cannot be read: it is shorter than a header"),
        ("long.safetensors", struct.pack("<Q", 99) + b"{}", "cannot be read: its header has 99 bytes, and the file 10"),
        (
            "bytes.safetensors",
            struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'.ljust(60) + b"1234",
            "cannot be read: its entry 'a' has bytes 0 to 4 of 4; expected 8 bytes",
        ),
    ],
)
def test_files_that_cannot_be_read_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / name)


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_pickle_of_more_than_tensors_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Harmful()}, tmp_path / "harm.pt")
    with pytest.raises(UserError, match="is not a state dict of tensors alone"):
        read_weights(tmp_path / "harm.pt")
    assert "executed" not in capsys.readouterr().out


def test_a_tensor_that_the_model_has_twice_may_be_in_the_file_once() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "head": torch.nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    fit = match_weights(model.state_dict(keep_vars=True), {"embed.weight": torch.zeros(5, 3)})
    assert not fit.problems and list(fit.chosen) == ["embed.weight"]


def test_a_prefix_of_all_names_is_explained(weights: dict[str, torch.Tensor]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    for prefix, by in (("module.", ", by DataParallel"), ("_orig_mod.", ", by torch.compile"), ("net.", "")):
        text = explain_prefix(model, {f"{prefix}{name}": value for name, value in weights.items()})
        assert text.startswith(f"; its names begin with '{prefix}'{by}: save them without it")
    assert not explain_prefix(model, {"other": torch.zeros(3), "another": torch.zeros(3)})
