"""Call a function of torch tensors from a training step of Keras, compiled or not, on any of its backends.

    JAX          io_callback in a jitted step; needs two threads of XLA, `hvdtrain.keras.world.init` sees to that
    TensorFlow   py_function in a graph; XLA cannot compile it
    torch        a plain call

The tensors travel by DLPack, without a copy where the backend allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from hvdtrain.system.errors import UserError

KerasTensor: TypeAlias = Any  # a tensor of the backend, which may be one of a graph that is being traced
HostFunction: TypeAlias = Callable[[list[torch.Tensor]], list[torch.Tensor]]


def call_on_host(function: HostFunction, tensors: Sequence[KerasTensor]) -> list[KerasTensor]:
    """Return what a function makes of dense tensors, as the backend's tensors.

    Args:
        function: must not change its arguments; returns tensors of the same shapes and types, whose memory it neither
            keeps nor changes afterwards.
        tensors: its arguments.
    """
    return _CALLS[keras.backend.backend()](function, tensors)


def _call_from_torch(function: HostFunction, tensors: Sequence[KerasTensor]) -> list[KerasTensor]:
    return function(list(tensors))


def _call_from_jax(function: HostFunction, tensors: Sequence[KerasTensor]) -> list[KerasTensor]:
    import jax
    from jax.experimental import io_callback

    def call(*arrays: Any) -> list[Any]:
        return [export_numpy(result) for result in function([from_dlpack(array) for array in arrays])]

    if not any(isinstance(tensor, jax.core.Tracer) for tensor in tensors):
        return [jax.numpy.asarray(result) for result in call(*tensors)]
    shapes = [jax.ShapeDtypeStruct(t.shape, t.dtype) for t in tensors]  # type: ignore[no-untyped-call]
    return list(io_callback(call, shapes, *tensors))


def export_numpy(tensor: torch.Tensor) -> Any:
    """Return a numpy array in the tensor's memory; numpy has bfloat16 from ml_dtypes, which torch does not know."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def _call_from_tensorflow(function: HostFunction, tensors: Sequence[KerasTensor]) -> list[KerasTensor]:
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise UserError(
            "hvdtrain.keras.DistributedOptimizer cannot be compiled by TensorFlow's XLA: "
            "expected model.compile(..., jit_compile=False), got jit_compile=True, or 'auto' with a GPU"
        )

    def call(*eager: Any) -> list[Any]:
        arguments = [from_dlpack(tf.experimental.dlpack.to_dlpack(tensor)) for tensor in eager]
        results = function(arguments)
        return [tf.experimental.dlpack.from_dlpack(to_dlpack(result)) for result in results]

    results = tf.py_function(call, tensors, [tensor.dtype for tensor in tensors])
    for result, tensor in zip(results, tensors, strict=True):
        result.set_shape(tensor.shape)
    return list(results)


_CALLS: dict[str, Callable[[HostFunction, Sequence[KerasTensor]], list[KerasTensor]]] = {
    "jax": _call_from_jax,
    "tensorflow": _call_from_tensorflow,
    "torch": _call_from_torch,
}
