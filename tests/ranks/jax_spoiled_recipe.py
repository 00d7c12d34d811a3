"""A JAX recipe for tests, which is not as it should be."""

import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from tests.ranks.jax_recipes import Line


@dataclass(kw_only=True)
class Spoiled(Line):
    """What is not as it should be, by HVDTRAIN_TEST_SPOIL."""

    def model(self, key):
        what, model = os.environ["HVDTRAIN_TEST_SPOIL"], super().model(key)
        slope = model["params"]["slope"]
        params = {
            "integer": {"n": jnp.arange(3)},
            "function": {"f": jnp.tanh},
            "number": {"f": 1.0},
            "twice": {"a": {"b": slope}, "a.b": slope},
            "key": {"k": jax.random.key(0)},
        }
        state = {
            "structure": {"batch_stats": {"mean": slope}},
            "shape": {"batch_stats": {"mean": slope}},
            "state type": {"batch_stats": {"mean": slope, "n": jnp.zeros((), jnp.int32)}},
        }
        if what == "tuple model":
            return model["params"], {}
        if what == "no params":
            return {"weights": slope}
        if what == "empty params":
            return {"params": {}}
        if what == "model raises":
            raise ValueError("of model")
        return {"params": model["params"] | params.get(what, {}), **state.get(what, {})}

    def optimizer(self):
        what = os.environ["HVDTRAIN_TEST_SPOIL"]
        if what == "optimizer raises":
            raise ValueError("of optimizer")
        made = {
            "no optimizer": None,
            "torch optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1),
            "empty dict": {},
            "rate": 0.1,
            "polyak": optax.polyak_sgd(self.lr),
        }
        return made.get(what, super().optimizer()) if what in made else super().optimizer()

    def score(self, model, batch, key):
        what, scores = os.environ["HVDTRAIN_TEST_SPOIL"], super().score(model, batch, key)
        loss = scores["loss"]
        if what == "step":
            return {"loss": loss * self.now.step}
        if what == "steps":
            return {"loss": loss * self.now.steps}
        if what == "branch":
            return {"loss": loss if loss.sum() > 0 else -loss}
        if what == "numpy":
            return {"loss": np.asarray(loss)}
        if what == "float":
            return {"loss": loss * float(loss[0])}
        if what == "key error":
            return {"loss": model["params"]["offset"]}
        if what == "mismatch":
            return {"loss": batch[0] @ model["params"]["slope"][:2]}
        if what == "random":
            return {"loss": loss * jax.random.normal(key, loss.shape)}
        if what == "boolean index":
            return {"loss": loss[batch[1] > 0]}
        if what == "concrete length":
            return {"loss": loss * jnp.arange(batch[1][0])}
        spoiled = {
            "scalar": {"loss": loss.mean()},
            "none": None,
            "nothing": {},
            "array": loss,
            "no loss": {"accuracy": loss},
            "other later": {"loss": loss, ("a" if key is None else "b"): loss},
            "more later": {"loss": loss} | ({"a": loss} if key is None else {}),
            "vector loss": {"loss": loss[:, None]},
            "three": {"loss": (loss, loss, loss)},
            "negative": {"loss": (loss, loss * 0 - 1)},
            "wide": {"loss": loss, "hits": (loss, jnp.stack([loss, loss], 1))},
            "complex": {"loss": loss, "hits": loss + 1j},
            "float score": {"loss": loss, "hits": 3.0},
            "integer loss": {"loss": loss.astype(jnp.int32)},
            "constant loss": {"loss": jax.lax.stop_gradient(loss)},
            "text": {"loss": loss, "hits": "high"},
            "list of scores": [("loss", loss)],
            "structure": (scores, {"batch_stats": {"var": loss}}),
            "shape": (scores, {"batch_stats": {"mean": loss}}),
            "typo": (scores, {"batch_stat": {"mean": loss}}),
            "params returned": (scores, {"params": model["params"]}),
            "whole model": (scores, model),
            "three returned": (scores, {}, {}),
            "nan": {"loss": loss * jnp.nan},
        }
        return spoiled.get(what, scores)
