"""The recipes `gan` and `distill`, short: they train for real."""

from __future__ import annotations

from pathlib import Path

from tests.ranks.harness import ROOT
from tests.support.worlds import KeptWorld, train


def test_the_generator_learns_to_draw_digits_in_turns_with_the_discriminator(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, str(ROOT / "recipes" / "gan.py"), tmp_path / "run", "--epochs", "20", "--eval-every", "460")
    assert summary["eval"]["accuracy"] > 0.3  # by chance 0.1
    assert summary["eval"]["classes"] > 5
    assert summary["best"]["metric"] == "accuracy"


def test_a_student_with_a_teacher_is_better_than_alone(world2: KeptWorld, tmp_path: Path) -> None:
    recipe, options = str(ROOT / "recipes" / "distill.py"), ("--seed", "1", "--eval-every", "300")
    taught = train(world2, recipe, tmp_path / "taught", *options)["eval"]
    alone = train(world2, recipe, tmp_path / "alone", *options, "--alone")["eval"]
    assert taught["accuracy"] > alone["accuracy"] > 0.75
