"""Keras recipes with the options of `hvdtrain train` on real ranks, on the JAX backend in a world of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import harness
from tests.ranks.elastic import verify
from tests.ranks.harness import ROOT
from tests.ranks.test_deterministic import digest
from tests.ranks.test_jax_options import column
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorlds, refusal, train

DIGITS = str(ROOT / "recipes" / "digits_keras.py")
BACKENDS = ["jax", *slow("tensorflow", "torch")]
pytestmark = pytest.mark.parametrize("keras_worlds", BACKENDS, indirect=True)
SAME_BITS = ["--epochs", "1", "--deterministic", "--dropout", "0.2", "--clip-norm", "0.5", "--micro-batch", "6"]
SAME_BITS += ["--ema", "0.9"]


@pytest.fixture(scope="module")
def alone(keras_worlds: KeptWorlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of two epochs on one rank, and the losses of all steps."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    summary = train(keras_worlds[1], DIGITS, folder, "--epochs", "2", "--log-every", "1", "--threads", "1")
    return {**summary, "losses": column(folder, "loss")}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [2, *slow(3)])
def test_any_number_of_ranks_has_the_losses_of_one(
    ranks: int, keras_worlds: KeptWorlds, alone: dict[str, Any], tmp_path: Path
) -> None:
    options = ["--epochs", "2", "--log-every", "1", "--threads", "1", "--diagnose"]
    summary = train(keras_worlds[ranks], DIGITS, tmp_path / "run", *options)
    assert (summary["framework"], summary["world_size"], summary["samples_seen"]) == ("keras", ranks, 2 * 1437)
    assert column(tmp_path / "run", "loss") == pytest.approx(alone["losses"], rel=1e-5)
    assert summary["eval"]["accuracy"] == alone["eval"]["accuracy"]
    assert summary["compilations"] == alone["compilations"]
    assert json.loads((tmp_path / "run" / "diagnose.json").read_text())["drift"] is None
    verify(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_same_bits_on_1_and_2_ranks_and_resumed(keras_worlds: KeptWorlds, tmp_path: Path) -> None:
    train(keras_worlds[1], DIGITS, tmp_path / "one", *SAME_BITS)
    train(keras_worlds[2], DIGITS, tmp_path / "two", *SAME_BITS[2:], "--steps", "5")
    train(keras_worlds[2], DIGITS, tmp_path / "two", "--resume", "--epochs", "1")
    assert digest(tmp_path / "two") == digest(tmp_path / "one")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "options",
    [
        ["--amp", "fp16", "--micro-batch", "22", "--compression", "fp16"],
        *slow(
            ["--amp", "bf16", "--compression", "int8,min=100"],
            ["--compression", "powersgd:4,min=100,warmup=0"],
            ["--compression", "topk:0.25,min=100,warmup=0"],
            ["--compression", "auto,min=64"],
            ["--batch-norm", "--workers", "1"],
        ),
    ],
    ids=" ".join,
)
def test_options_train(options: list[str], keras_worlds: KeptWorlds, tmp_path: Path) -> None:
    common = ["--epochs", "3", "--log-every", "1", "--threads", "1", "--diagnose", "--ema", "0.5"]
    summary = train(keras_worlds[2], DIGITS, tmp_path / "run", *common, *options)
    losses = column(tmp_path / "run", "loss")
    assert losses[-1] < 0.8 * losses[0] and summary["finished"]
    assert json.loads((tmp_path / "run" / "diagnose.json").read_text())["drift"] is None


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_digits_reaches_97_percent(ranks: int, keras_worlds: KeptWorlds, tmp_path: Path) -> None:
    assert train(keras_worlds[ranks], DIGITS, tmp_path / "run", "--threads", "1")["eval"]["accuracy"] >= 0.97


def test_what_is_for_torch_only_is_refused_by_name(keras_worlds: KeptWorlds, tmp_path: Path) -> None:
    for option in ("--compile", "--sync-batchnorm", "--shard optimizer"):
        text = refusal(keras_worlds[1], DIGITS, tmp_path / "run", *option.split())
        assert text.startswith(f"{option} is for torch, and ") and "\n" not in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["horovodrun", "horovodrun-mpi", "mpirun"])
def test_each_launcher_gives_the_same_bits(
    kind: str, keras_worlds: KeptWorlds, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    train(keras_worlds[1], DIGITS, tmp_path / "one", *SAME_BITS)
    harness.train(
        kind,
        2,
        DIGITS,
        tmp_path / "run",
        *SAME_BITS,
        env={"KERAS_BACKEND": request.node.callspec.params["keras_worlds"]},
    )
    assert digest(tmp_path / "run") == digest(tmp_path / "one")
