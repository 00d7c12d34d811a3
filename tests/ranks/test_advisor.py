"""`--compression auto` on ranks: nothing is lost when the method changes, and all ranks change together."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.ranks.harness import ROOT, run, train

CHECKS = Path(__file__).parent / "advisor_checks.py"


@pytest.mark.parametrize("ranks", [2, 3])
def test_changes_and_decisions(ranks: int) -> None:
    done = run("horovodrun", ranks, [sys.executable, str(CHECKS)])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for name in re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE):
        assert output.count(f"ok {name}\n") == ranks, output


def test_training_and_its_run_folder(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", str(ROOT / "recipes" / "digits.py")
    summary = train("horovodrun", 2, recipe, folder, "--compression", "auto,min=64", "--threads", "1")
    advice = json.loads((folder / "advisor.json").read_text())
    assert advice["network"]["bytes_per_second"] > 0
    assert [row["choice"] for row in advice["rows"] if set(row["choice"]) == {"none"}]
    assert summary["compression"] == "auto,min=64"
    assert summary["eval"]["accuracy"] > 0.95
    assert sum(bucket["values"] for bucket in summary["buckets"]) == 21_386
    # Resumed, it measures anew.
    before = (folder / "advisor.json").stat().st_mtime_ns
    again = train("horovodrun", 2, recipe, folder, "--resume", "--epochs", "38", "--threads", "1")
    assert again["resumed_from"] == summary["steps"]
    assert (folder / "advisor.json").stat().st_mtime_ns > before


def test_one_rank_has_nothing_to_choose(tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", str(ROOT / "recipes" / "digits.py")
    train("alone", 1, recipe, folder, "--compression", "auto", "--steps", "3")
    assert not (folder / "advisor.json").exists()
