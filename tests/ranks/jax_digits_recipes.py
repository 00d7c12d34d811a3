"""JAX recipes for tests: digits at a pace, with batch norm, and one whose gradients overflow at an example."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hvdtrain.data import Arrays
from hvdtrain.jax import Recipe, option
from hvdtrain.recipe.registry import load_recipe

DigitsJax: Any = load_recipe("digits_jax")


@dataclass(kw_only=True)
class SlowDigits(DigitsJax):  # type: ignore[misc]
    """digits_jax, slowly, for tests.ranks.elastic."""

    pause: float = option(0.05, "seconds that each batch takes longer, until the fault file says hurry")
    fault: str = option("", "a file that says what to do next")
    epochs: int = 6

    def collate(self, examples: list[Any]) -> Any:
        hurry = Path(self.fault).is_file() and Path(self.fault).read_text() == "hurry"
        time.sleep(0 if hurry else self.pause)
        deadline = time.monotonic() + 0.2  # a batch has several shards
        while self.fault and Path(f"{self.fault}.hold").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return super().collate(examples)


@dataclass(kw_only=True)
class Least(Recipe):
    """Least squares of 61 examples."""

    epochs: int = 2
    batch_size: int = 6
    lr: float = 0.01
    schedule: str = "constant"

    def model(self, key: Any) -> dict[str, Any]:
        return {"params": {"slope": jax.random.normal(key, (5,)), "offset": jnp.zeros(())}}

    def dataset(self, split: str) -> Arrays:
        x = np.random.default_rng(len(split)).standard_normal((61, 5), dtype=np.float32)
        return Arrays(x, x @ np.linspace(-1, 1, 5, dtype=np.float32), np.arange(61) == 30)

    def optimizer(self) -> Any:
        return optax.sgd(self.lr, momentum=0.9)

    def score(self, model: Any, batch: Any, key: Any) -> Any:
        params, (x, y, _) = model["params"], batch
        errors = (x @ params["slope"] + params["offset"] - y).astype(jnp.float32)
        return {"loss": errors**2, "within": (abs(errors) < 0.1).astype(jnp.float32)}


@dataclass(kw_only=True)
class Overflow(Least):
    """One example of the 61 has a finite loss and a gradient that is not; the loss itself is not if asked for."""

    def score(self, model: Any, batch: Any, key: Any) -> Any:
        scores, odd = super().score(model, batch, key), batch[2]
        spoiled = jnp.sqrt(jnp.where(odd, 0.0, 1.0) * (model["params"]["slope"].astype(jnp.float32) ** 2).sum())
        scores["loss"] += 1e-3 * spoiled
        if os.environ.get("HVDTRAIN_TEST_NAN"):
            scores["loss"] = jnp.where(odd, jnp.nan, scores["loss"])
        return scores


@dataclass(kw_only=True)
class Norm(Least):
    """Batch norm, whose means are what training changes next to the parameters."""

    def model(self, key: Any) -> dict[str, Any]:
        return {**super().model(key), "batch_stats": {"mean": jnp.zeros(5), "batches": jnp.zeros((), jnp.int32)}}

    @property
    def buffers(self) -> dict[str, str]:  # type: ignore[override]
        return {"batch_stats.batches": "rank0"}

    def score(self, model: Any, batch: Any, key: Any) -> Any:
        stats = model["batch_stats"]
        mean = stats["mean"] if key is None else batch[0].mean(0)
        scores = super().score(model, (batch[0] - mean, *batch[1:]), key)
        new = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "batches": stats["batches"] + 1}
        return scores, {"batch_stats": new}
