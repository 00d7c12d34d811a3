"""A recipe in hvdtrain's own loop, whose steps are timed from outside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import hvdtrain
from hvdtrain.training import loop
from tests.benchmarks.framework_ways.models import LR
from tests.benchmarks.framework_ways.pace import FOLDER_VARIABLE, Pace

LONG = 10**6  # steps: more than are measured


def train_recipe(recipe: hvdtrain.Recipe, examples: int, pace: Pace, **run_options: Any) -> None:
    """Train as `hvdtrain train` does, with its ledger and its reports; a step includes all that the loop does."""
    original = loop.train_step

    def timed_step(*arguments: Any) -> Any:
        pace.begin_step()
        return original(*arguments)

    loop.train_step = timed_step
    # All ranks have the same folder.
    run_dir = Path(os.environ[FOLDER_VARIABLE]) / "run"
    options = {"run_dir": str(run_dir), "batch_per_rank": examples, "steps": LONG, "threads": 1, "quiet": True}
    hvdtrain.fit(recipe, lr=LR, **options, **run_options)
