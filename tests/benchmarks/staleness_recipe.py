"""digits on paced workers: an example takes PACE seconds, on the last rank four times as long. Notes when rows come."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hvdtrain.recipe.registry import load_recipe
from hvdtrain.torch import option

PACE = 0.0005  # seconds
SLOWNESS = 4
Digits: Any = load_recipe(str(Path(__file__).parents[2] / "recipes" / "digits.py"))


@dataclass(kw_only=True)
class Paced(Digits):  # type: ignore[misc]
    """digits, at the pace of workers of which one has a quarter of the others' speed."""

    momentum: float = option(0.9, "of SGD")

    def optimizer(self, params: Any) -> Any:
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, weight_decay=1e-4)

    def score(self, model: Any, batch: Any) -> Any:
        began, scores = time.perf_counter(), super().score(model, batch)
        if model.training and torch.is_grad_enabled() and not self.now.is_trial:
            is_last = os.environ["OMPI_COMM_WORLD_RANK"] == str(int(os.environ["OMPI_COMM_WORLD_SIZE"]) - 1)
            time.sleep(max(0.0, len(batch[0]) * PACE * (SLOWNESS if is_last else 1) - (time.perf_counter() - began)))
        return scores

    def logged(self, row: dict[str, Any]) -> None:
        with (self.now.folder / "times.jsonl").open("a") as file:
            file.write(
                json.dumps([time.time(), row["samples"], row["samples_per_second"], row.get("eval_accuracy")]) + "\n"
            )
