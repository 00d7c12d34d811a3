"""Training as a part of a larger MPI job."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ranks.harness import rows, run, train

RECIPE = f"{Path(__file__).parent / 'exact_recipe.py'}:Exact"


@pytest.mark.slow
def test_two_trainings_side_by_side_on_split_communicators(tmp_path: Path) -> None:
    script = str(Path(__file__).parent / "coupling.py")
    done = run("mpirun", 4, [sys.executable, script, str(tmp_path), RECIPE])
    assert done.returncode == 0, done.stdout + done.stderr
    for folder, lr in (("0", "0.001"), ("1", "0.003"), ("all", "0.003")):
        train("alone", 1, RECIPE, tmp_path / f"alone-{folder}", "--lr", lr, "--steps", "30", "--log-every", "1")
        alone = [row["loss"] for row in rows(tmp_path / f"alone-{folder}")]
        assert [row["loss"] for row in rows(tmp_path / folder)] == pytest.approx(alone, rel=1e-12)
