"""What is done with a run afterwards: its config.json read back, in the form of today and the one before."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.worlds import KeptWorld, train

EXACT = f"{Path(__file__).parent / 'exact_recipe.py'}:Exact"


def test_a_flat_config_json_of_an_earlier_hvdtrain_is_resumed(world1: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(world1, EXACT, folder, "--steps", "2", "--lr", "0.01")
    config = json.loads((folder / "config.json").read_text())
    flat = {"recipe": config["name"], "options": {**config["recipe"], **config["run"]}}
    (folder / "config.json").write_text(json.dumps(flat))
    summary = train(world1, EXACT, folder, "--resume", "--steps", "3")
    resumed = json.loads((folder / "config.json").read_text())
    assert summary["resumed_from"] == 2 and resumed["recipe"] == config["recipe"]
    assert resumed["run"] == {**config["run"], "steps": 3}
