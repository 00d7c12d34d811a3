"""The network as a JAX recipe."""

from __future__ import annotations

from dataclasses import dataclass

import optax

from hvdtrain.jax import Recipe
from tests.benchmarks.framework_ways.jax_ways import compute_losses, make_params
from tests.benchmarks.framework_ways.models import MOMENTUM, SHAPES, ManyExamples


@dataclass(kw_only=True)
class JaxRecipe(Recipe):
    """The network in JAX."""

    evals = ()
    net: str = "mlp"

    def model(self, key):
        return {"params": make_params(self.net, key)}

    def dataset(self, split):
        return ManyExamples(SHAPES[self.net])

    def optimizer(self):
        return optax.sgd(self.lr, momentum=MOMENTUM)

    def score(self, model, batch, key):
        return {"loss": compute_losses(self.net, model["params"], *batch)}
