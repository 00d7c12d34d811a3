"""Compression in `hvdtrain train`: resuming, mixed precision, Horovod's own exchange, wrong specifications."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import hvdtrain
from hvdtrain.compression.options import CompressionOptions
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch.step import TorchStep
from tests.ranks.harness import HVDTRAIN, ROOT, rows, run
from tests.support.worlds import KeptWorld, refusal, train

DIGITS = str(ROOT / "recipes" / "digits.py")
SPECS = ["onebit,min=100", "topk:0.05,min=100,warmup=0", "powersgd:2,min=100,warmup=0", "qsgd:4bit,min=100"]


def saved(run_dir: Path, step: int) -> dict[str, object]:
    return torch.load(run_dir / "checkpoints" / f"step-{step}" / "state", weights_only=True)


@pytest.mark.parametrize("spec", SPECS)
def test_resume_with_exact_residuals_is_bit_for_bit(spec: str, world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--compression", spec, "--checkpoint-residuals", "exact", "--log-every", "1", "--threads", "1"]
    options += ["--steps", "16", "--checkpoint-every", "10", "--eval-every", "100"]
    train(world2, DIGITS, tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-16")
    assert train(world2, DIGITS, tmp_path / "resumed", "--resume")["resumed_from"] == 10
    losses, others = ([row["loss"] for row in rows(tmp_path / name)] for name in ("resumed", "whole"))
    assert losses == others
    weights, expected = (saved(tmp_path / name, 16)["model"] for name in ("resumed", "whole"))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_the_debt_of_all_ranks_survives_a_change_of_their_number(
    world2: KeptWorld, world3: KeptWorld, tmp_path: Path
) -> None:
    """Two ranks' residuals, summed, are what three ranks owe together right after resuming."""
    spec = ["--compression", "topk:0.05,min=100,warmup=0", "--threads", "1"]
    train(world2, DIGITS, tmp_path / "run", *spec, "--steps", "10")
    before = saved(tmp_path / "run", 10)["exchange"]["debts"]
    assert max(float(debt.abs().max()) for debt in before.values()) > 0
    shutil.copytree(tmp_path / "run", tmp_path / "more", symlinks=True)
    # Nothing left to train: what was loaded is saved again, under the next step's name.
    shutil.copytree(tmp_path / "more" / "checkpoints" / "step-10", tmp_path / "kept")
    world3.run(load_and_save, spec[1], tmp_path / "kept" / "state", tmp_path / "again")
    after = torch.load(tmp_path / "again", weights_only=True)["exchange"]["debts"]
    assert after.keys() == before.keys()
    for name, debt in before.items():
        torch.testing.assert_close(after[name], debt)


def load_and_save(compression: str, saved: Path, again: Path) -> None:
    world = hvdtrain.init()
    step = TorchStep(load_recipe(DIGITS)(), world, StepOptions(compression=CompressionOptions(spec=compression)))
    step.load_state(saved.read_bytes())
    state = step.gather_state()
    if world.rank == 0:
        again.write_bytes(state)


@pytest.mark.slow
def test_amp_fp16_rescales_the_residuals(world2: KeptWorld, tmp_path: Path) -> None:
    """The loss scale falls in the first steps and the residuals with it: the run stays close to the dense one."""
    options = ["--amp", "fp16", "--steps", "40", "--log-every", "1", "--clip-norm", "1", "--threads", "1"]
    dense = train(world2, DIGITS, tmp_path / "dense", *options)
    coded = train(world2, DIGITS, tmp_path / "coded", *options, "--compression", "int8,min=100")
    assert coded["eval"]["loss"] == pytest.approx(dense["eval"]["loss"], rel=0.05)
    assert coded["wire_bytes_per_step"] < 0.3 * dense["wire_bytes_per_step"]
    assert coded["compression"] == "int8,min=100"


@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_horovods_own_exchange_trains_alike(compression: str, world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--steps", "24", "--log-every", "1", "--micro-batch", "22", "--clip-norm", "0.5", "--threads", "1"]
    losses = []
    for name, exchange in (("ours", "bucketed"), ("stock", "horovod")):
        more = ["--exchange", exchange, "--compression", compression]
        train(world2, DIGITS, tmp_path / name, *options, *more)
        losses.append([row["loss"] for row in rows(tmp_path / name)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if compression == "none" else 1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--compression", "powersgd:0"],
            "compression 'powersgd:0': '0' is not a valid rank; expected an integer of at least 1",
        ),
        (
            ["--compression", "topk:2"],
            "compression 'topk:2': '2' is not a valid fraction; expected a number above 0, at most 1",
        ),
        (["--compression", "int9"], "compression 'int9': 'int9' is not a method; did you mean 'int8'?"),
        (["--compression", "int8,mni=3"], "compression 'int8,mni=3': 'mni' is not an option; did you mean 'min'?"),
        (
            ["--compression", "int8", "--exchange", "horovod"],
            "compression 'int8' needs the bucketed exchange; Horovod's own takes none or fp16",
        ),
        (
            ["--compression", "topk:0.1,momentum=0.9"],
            "compression 'topk:0.1,momentum=0.9': its momentum replaces the optimizer's: set that to 0",
        ),
    ],
)
def test_invalid_compression_options_are_refused(
    options: list[str], message: str, world1: KeptWorld, tmp_path: Path
) -> None:
    assert refusal(world1, DIGITS, tmp_path / "run", *options) == message


def test_a_layer_that_matches_nothing(tmp_path: Path) -> None:
    options = ["--run-dir", str(tmp_path / "run"), "--compression", "topk:0.1,layer.fc=0.5"]
    done = run("alone", 1, [*HVDTRAIN, "launch", "-np", "2", DIGITS, *options])
    message = "compression 'topk:0.1,layer.fc=0.5': there is no parameter or module 'fc'; there are: 0, 3, 7"
    assert done.returncode == 2
    assert message in done.stderr
