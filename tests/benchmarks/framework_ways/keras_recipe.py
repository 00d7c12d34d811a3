"""The network as a Keras recipe. KERAS_BACKEND is set before this is imported."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from hvdtrain.keras import Recipe
from tests.benchmarks.framework_ways.keras_fit import make_model
from tests.benchmarks.framework_ways.models import MOMENTUM, SHAPES, ManyExamples


@dataclass(kw_only=True)
class KerasRecipe(Recipe):
    """The network in Keras."""

    evals = ()
    net: str = "mlp"

    def model(self):
        return make_model(self.net)

    def dataset(self, split):
        return ManyExamples(SHAPES[self.net])

    def optimizer(self):
        return keras.optimizers.SGD(self.lr, momentum=MOMENTUM)

    def score(self, model, batch):
        images, labels = batch
        return {"loss": keras.losses.sparse_categorical_crossentropy(labels, model(images), from_logits=True)}
