"""recipes/resnet50.py and recipes/simclr.py, trained for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.ranks.harness import ROOT, rows
from tests.support.worlds import KeptWorld, refusal, train

RESNET50 = str(ROOT / "recipes" / "resnet50.py")
SIMCLR = str(ROOT / "recipes" / "simclr.py")


@pytest.mark.slow
def test_resnet50_learns_synthetic_images(world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--synthetic", "--synthetic-examples", "128", "--classes", "4", "--epochs", "2"]
    options += [
        "--depth",
        "18",
        "--image-size",
        "32",
        "--batch-size",
        "32",
        "--optimization",
        "lars",
        "--lr",
        "20",
        "--schedule",
        "warmup:1ep cosine",
    ]
    summary = train(world2, RESNET50, tmp_path / "run", *options, "--label-smoothing", "0.1")
    assert summary["eval"]["top1"] >= 0.8, summary


def test_resnet50_reads_folders_of_images(world2: KeptWorld, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name, colour in (("cat", (200, 30, 30)), ("dog", (30, 30, 200))):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40 + i, 36), colour).save(folder / f"{i}.png")
    options = ["--data-dir", str(tmp_path / "data"), "--depth", "18", "--image-size", "32", "--batch-size", "8"]
    summary = train(world2, RESNET50, tmp_path / "run", *options, "--epochs", "1", "--sync-batchnorm")
    assert summary["samples_seen"] == 8
    assert summary["eval"]["top5"] == 1.0
    text = refusal(world2, RESNET50, tmp_path / "none", "--data-dir", str(tmp_path / "none"))
    assert f"no images in {tmp_path / 'none' / 'train'}: expected " in text


def test_lars_is_what_its_paper_says() -> None:
    """Algorithm 1 of You et al. (2017), two steps, in float64."""
    from recipes.resnet50 import LARS

    weights = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
    p, bias = torch.nn.Parameter(weights.clone()), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = LARS([{"params": [p], "weight_decay": 0.1}, {"params": [bias]}], lr=0.5, momentum=0.9, trust=0.01)
    velocity, other, speed = torch.zeros_like(weights), torch.ones(3, dtype=torch.float64), torch.zeros(3).double()
    for step in range(2):
        gradient = torch.full_like(weights, 0.3 + step)
        p.grad, bias.grad = gradient.clone(), torch.full_like(bias, 2.0)
        optimizer.step()
        local = 0.01 * weights.norm() / (gradient.norm() + 0.1 * weights.norm())
        velocity = 0.9 * velocity + 0.5 * local * (gradient + 0.1 * weights)
        weights = weights - velocity
        speed = 0.9 * speed + 0.5 * 2.0
        other = other - speed
    torch.testing.assert_close(p.detach(), weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.detach(), other, rtol=1e-12, atol=1e-12)
    assert pytest.approx(0.5) == optimizer.param_groups[0]["lr"]


def test_simclr_is_the_same_on_two_ranks(world1: KeptWorld, world2: KeptWorld, tmp_path: Path) -> None:
    """Its negatives and its batch norm are over all ranks; digits are told apart better than by chance (0.1)."""
    options = ["--steps", "12", "--eval-every", "12", "--log-every", "1", "--width", "16", "--threads", "1"]
    one, two = (train(world, SIMCLR, tmp_path / str(world.size), *options) for world in (world1, world2))
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("1", "2")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][10] < losses[0][0]  # both over 128 examples, whose views are the negatives; the last over 29
    assert two["eval"]["loss"] == pytest.approx(one["eval"]["loss"], rel=1e-3)
    assert two["eval"]["probe"] == pytest.approx(one["eval"]["probe"], abs=0.02)
    assert one["eval"]["probe"] >= 0.6
