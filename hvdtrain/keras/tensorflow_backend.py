"""The backend TensorFlow of Keras: compiled by tf.function, memory shared by DLPack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from hvdtrain.bridge.functions import (
    Array,
    Arrays,
    Batch,
    Functions,
    Place,
    Pullback,
    PureOptimizer,
    Returned,
    UpdateProgram,
)
from hvdtrain.bridge.padding import map_arrays
from hvdtrain.system.errors import UserError
from hvdtrain.torch.scores import get_numerators

ALIGNMENT = 64  # bytes: TensorFlow aborts the process at the first operation on a tensor that begins elsewhere


def set_tensorflow_threads(threads: int, deterministic: bool) -> None:
    """Let TensorFlow use so many threads, and the CPU only; and let the same operations give the same bits if need be.

    What was set before TensorFlow's first operation in this process stays.

    Raises:
        UserError: it is to be deterministic, and was used before with several threads.
    """
    tf.get_logger().setLevel("ERROR")  # it warns of compiling again, which ragged batches need
    try:
        tf.config.set_visible_devices([], "GPU")
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError as error:
        if deterministic:
            raise UserError(
                "--deterministic, but TensorFlow has computed something in this process with other threads; expected "
                "its first operation in the recipe's methods"
            ) from error
    if deterministic:
        tf.config.experimental.enable_op_determinism()


class TensorFlowBackend:
    """`hvdtrain.bridge.functions.Backend` of Keras on TensorFlow, on the CPU."""

    def __init__(self) -> None:
        self.num_compilations = 0

    def import_tensor(self, tensor: Tensor) -> Array:
        if tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"a tensor at {tensor.data_ptr():#x} is not aligned to {ALIGNMENT} bytes")
        if tensor.numel() == 0 or tensor.dtype == torch.bool:  # of which DLPack has none
            return tf.constant(tensor.numpy())
        return tf.experimental.dlpack.from_dlpack(to_dlpack(tensor.detach()))

    def export_array(self, array: Array) -> Tensor:
        if array.dtype == tf.bool or 0 in array.shape:
            return torch.from_numpy(array.numpy())
        return from_dlpack(tf.experimental.dlpack.to_dlpack(array))

    def compile_score(self, functions: Functions, losses: Sequence[str]) -> TensorFlowScoreProgram:
        return TensorFlowScoreProgram(self, functions, losses)

    def compile_update(self, optimizer: PureOptimizer, places: Mapping[str, Place]) -> UpdateProgram:
        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def compiled(flats: Sequence[Array], state: Arrays, params: Arrays, factor: Array) -> tuple[Arrays, Arrays]:
            self.num_compilations += 1
            gradients = {
                name: tf.reshape(flats[place.flat][place.offset :][: int(np.prod(place.shape))], place.shape)
                for name, place in places.items()
            }
            return optimizer.update(gradients, state, params, factor)

        def update(flats: Sequence[Array], state: Arrays, params: Arrays, factor: float) -> tuple[Arrays, Arrays]:
            return compiled(list(flats), state, params, tf.constant(factor, tf.float32))  # type: ignore[no-any-return]

        return update


class TensorFlowScoreProgram:
    """`hvdtrain.bridge.functions.ScoreProgram` by tf.function; a GradientTape around it compiles its derivative."""

    def __init__(self, backend: TensorFlowBackend, functions: Functions, losses: Sequence[str]) -> None:
        self.losses = losses

        def score(params: Arrays, state: Arrays, batch: Batch, entropy: Array | None) -> tuple[Any, Arrays, Any]:
            backend.num_compilations += 1  # it runs when it is traced
            returned = functions.score(params, state, batch, entropy)
            return returned.scores, returned.state, returned.outputs

        def outputs(params: Arrays, state: Arrays, batch: Batch) -> Any:
            backend.num_compilations += 1
            return functions.outputs(params, state, batch)

        self._score, self._outputs = tf.function(score, autograph=False), tf.function(outputs, autograph=False)

    def score_for_training(
        self, params: Arrays, state: Arrays, batch: Batch, entropy: NDArray[Any]
    ) -> tuple[Returned, Pullback]:
        names, values = list(params), list(params.values())
        with tf.GradientTape(persistent=len(self.losses) > 1, watch_accessed_variables=False) as tape:
            tape.watch(values)
            returned = Returned(*self._score(params, state, move_batch(batch), tf.constant(entropy)))

        def pull_back(cotangents: Mapping[str, Tensor]) -> Arrays:
            numerators = [get_numerators(returned.scores[name]) for name in cotangents]
            given = [tf.constant(cotangent.numpy()) for cotangent in cotangents.values()]
            found = tape.gradient(numerators, values, given, unconnected_gradients="zero")
            return dict(zip(names, map(tf.convert_to_tensor, found), strict=True))

        return returned, pull_back

    def score_for_evaluation(self, params: Arrays, state: Arrays, batch: Batch) -> Returned:
        return Returned(*self._score(params, state, move_batch(batch), None))

    def compute_outputs(self, params: Arrays, state: Arrays, batch: Batch) -> Any:
        return self._outputs(params, state, move_batch(batch))


def move_batch(batch: Batch) -> Batch:
    """Return a batch of numpy arrays as TensorFlow's."""
    return map_arrays(tf.constant, batch)
