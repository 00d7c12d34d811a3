"""Keras recipes whose layers add to the loss, keep statistics, or have optimizers of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from hvdtrain.data import Arrays
from hvdtrain.keras import Recipe


class Added(layers.Layer):  # type: ignore[misc]
    """Adds to the loss a mean or a sum of its inputs' squares."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def call(self, x: Any) -> Any:
        self.add_loss(getattr(ops, self.how)(ops.square(x)) * 0.01)
        return x


@dataclass(kw_only=True)
class Regularized(Recipe):
    """A regression with regularizers."""

    epochs: int = 2
    batch_size: int = 12
    lr: float = 0.05
    added: str = ""  # "mean" or "sum"
    pairs: bool = False  # the loss is a mean by weights

    def model(self) -> Any:
        added = [Added(self.added)] if self.added else []
        l2 = keras.regularizers.L2(0.1)
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(8, activation="tanh", kernel_regularizer=l2), *added, layers.Dense(1)]
        )

    def dataset(self, split: str) -> Any:
        x = np.random.default_rng(split == "eval").normal(size=(31, 4)).astype(np.float32)
        return Arrays(x, x.sum(1, keepdims=True), np.arange(1, 32, dtype=np.float32))

    def optimizer(self) -> Any:
        return keras.optimizers.SGD(self.lr, momentum=0.9)

    def score(self, model: Any, batch: Any) -> Any:
        x, y, weight = batch
        squares = ops.square(model(x) - y)[:, 0]
        return {"loss": (squares * weight, weight) if self.pairs else squares}
