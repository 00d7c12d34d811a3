"""Keras's own `model.fit` with hvdtrain's DistributedOptimizer. KERAS_BACKEND is set before this is imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras

import hvdtrain.keras as hvd
from tests.benchmarks.framework_ways.models import CLASSES, LR, MOMENTUM, SHAPES, make_examples
from tests.benchmarks.framework_ways.pace import Pace

LONG = 10**6  # batches: more than are measured


def make_model(name: str) -> keras.Model:
    """(B, side, side, 3) -> (B, CLASSES)"""
    shape = SHAPES[name]
    layers: list[Any] = [keras.Input((shape.side, shape.side, 3))]
    for _, width in shape.convolutions:
        layers += [keras.layers.Conv2D(width, 3, padding="same", activation="relu"), keras.layers.MaxPooling2D(2)]
    layers.append(keras.layers.Flatten())
    layers += [keras.layers.Dense(width, activation="relu") for width in shape.widths]
    return keras.Sequential([*layers, keras.layers.Dense(CLASSES)])


class PaceCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Lets the benchmark time the steps."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.pace.begin_step()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert logs is not None
        float(logs["loss"])  # a step of JAX is not over before


def train_by_fit(name: str, examples: int, pace: Pace, compression: str = "none") -> None:
    """Train by model.fit, until the benchmark ends."""
    hvd.init()
    limit_threads()
    model = make_model(name)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(LR, momentum=MOMENTUM), compression=compression)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), PaceCallback(pace)]
    model.fit(repeat_batch(name, examples), steps_per_epoch=LONG, verbose=0, callbacks=callbacks)


def limit_threads() -> None:
    """One thread for each rank, as recipes have in this benchmark; XLA has two, of which one waits for the other."""
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def repeat_batch(name: str, examples: int) -> Iterator[tuple[Any, Any]]:
    """One batch again and again."""
    images, labels = (values[:examples] for values in make_examples(SHAPES[name]))
    while True:
        yield images, labels
