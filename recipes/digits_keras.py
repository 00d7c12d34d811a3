"""Handwritten digits by a small convolutional net in Keras, on any of its backends."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import distribution
from typing import Any, ClassVar, Literal

import keras
import numpy as np
from keras import layers, ops

from hvdtrain.data import Arrays
from hvdtrain.keras import Recipe, option


@dataclass(kw_only=True)
class DigitsKeras(Recipe):
    """Handwritten digits, 8x8 grey (UCI optical digits, shipped with scikit-learn), in Keras."""

    domain: ClassVar[str] = "vision"
    best: ClassVar[tuple[str, Literal["min", "max"]]] = ("accuracy", "max")

    width: int = option(32, "channels of the first convolution", at_least=1)
    dropout: float = option(0.0, "share of the features that are dropped in training", at_least=0)
    batch_norm: bool = option(False, "normalize after the first convolution, by the batch")
    epochs: int = 20
    batch_size: int = 64
    lr: float = 0.1
    schedule: str = "warmup:1ep cosine"

    def model(self) -> keras.Model:
        normalization = [layers.BatchNormalization()] if self.batch_norm else []
        dropout = [layers.Dropout(self.dropout)] if self.dropout else []
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(self.width, 3, padding="same"),
                *normalization,
                layers.ReLU(),
                # Strides, not max pooling: the background's values differ by rounding, which depends on the size of
                # the batch, and the gradient of a maximum would follow it.
                layers.Conv2D(2 * self.width, 3, strides=2, padding="same", activation="relu"),
                layers.Conv2D(2 * self.width, 3, strides=2, padding="same", activation="relu"),
                layers.Flatten(),
                *dropout,
                layers.Dense(10, dtype="float32"),  # with --amp too
            ]
        )

    def dataset(self, split: str) -> Arrays:
        file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        table = np.loadtxt(str(file), delimiter=",", dtype=np.float32)
        images, labels = table[:, :-1].reshape(-1, 8, 8, 1) / 16, table[:, -1].astype(np.int32)
        chosen = (np.arange(len(labels)) % 5 == 0) == (split == "eval")
        return Arrays(images[chosen], labels[chosen])

    def optimizer(self) -> keras.optimizers.Optimizer:
        return keras.optimizers.SGD(self.lr, momentum=0.9)

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        images, labels = batch
        logits = model(images)
        loss = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
        right = ops.equal(ops.argmax(logits, axis=-1), ops.cast(labels, "int32"))
        return {"loss": loss, "accuracy": ops.cast(right, "float32")}
