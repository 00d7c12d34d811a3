"""Layers in the mode of a training or of an evaluation, whoever calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.layers.layer import CallContext

CONTEXT = "current_call_ctx"  # Keras's name of what layers that are called within others inherit


@contextlib.contextmanager
def layer_mode(training: bool) -> Iterator[None]:
    """Let layers take `training` as if they were called by a layer that has it; an explicit argument counts more."""
    previous = global_state.get_global_attribute(CONTEXT)
    context = CallContext(entry_layer=None)
    context.set_value("training", training)
    global_state.set_global_attribute(CONTEXT, context)
    try:
        yield
    finally:
        global_state.set_global_attribute(CONTEXT, previous)


class LayerInMode:
    """A layer, or a model, that passes `training` by itself; everything else is the layer's own.

    A call `layer(x, training=False)` has no effect on later calls, which it would have in `layer_mode` alone.
    """

    def __init__(self, layer: Any, training: bool) -> None:
        self._layer, self._training = layer, training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with layer_mode(self._training):
            return self._layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        return LayerInMode(value, self._training) if isinstance(value, keras.Layer) else value
