"""JAX as a backend: jitted functions, and arrays that share their memory with torch by DLPack.

Score and pullback are two programs, so that the sums of the scores travel while gradients are computed. What the first
keeps for the second is returned by it; parameters and batch are not copied into that, but given to both.

JAX's rules (https://github.com/jax-ml/jax/pull/19183): nobody writes into memory that it has allocated, and what it has
imported does not change while it computes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

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
from hvdtrain.torch.scores import get_numerators


@partial(jax.tree_util.register_dataclass, data_fields=["kept"], meta_fields=["structure", "shared"])
@dataclass(frozen=True)
class Residuals:
    """What a score keeps for its pullback.

    Attributes:
        kept: arrays that only it has.
        structure: of the pullback, as a tree of arrays.
        shared: of each of its arrays, the number of the argument of the score that it is; None: it is the next of
            `kept`.
    """

    kept: list[Array]
    structure: Any
    shared: tuple[int | None, ...]


class JaxBackend:
    """JAX on one device; `hvdtrain.bridge.functions.Backend`."""

    def __init__(self, device: Any = None) -> None:
        """Take the device to compute on; None: JAX's first one."""
        self.device = device or jax.local_devices()[0]
        self.num_compilations = 0

    def import_tensor(self, tensor: Tensor) -> Array:
        if tensor.numel() == 0:
            return jax.device_put(jnp.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")), self.device)
        return jnp.from_dlpack(tensor, copy=False)

    def export_array(self, array: Array) -> Tensor:
        if isinstance(array, np.ndarray):
            array = jax.device_put(array, self.device)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
        return from_dlpack(array)

    def compile_score(self, functions: Functions, losses: Sequence[str]) -> JaxScore:
        return JaxScore(self, functions, losses)

    def compile_update(self, optimizer: PureOptimizer, places: Mapping[str, Place]) -> UpdateProgram:
        @self.compile_function
        def update(flats: Sequence[Array], state: Arrays, params: Arrays, factor: Array) -> tuple[Arrays, Arrays]:
            gradients = {name: cut_gradient(flats, place) for name, place in places.items()}
            return optimizer.update(gradients, state, params, factor)

        def run(flats: Sequence[Array], state: Arrays, params: Arrays, factor: float) -> tuple[Arrays, Arrays]:
            updated: tuple[Arrays, Arrays] = update(flats, state, params, np.float64(factor))
            await_arrays(updated)
            return updated

        return run

    def compile_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is compiled once for each structure and shapes of its arguments, and counted."""

        def traced(*args: Any) -> Any:
            self.num_compilations += 1
            return function(*args)

        return jax.jit(traced)


class JaxScore:
    """A compiled score; `hvdtrain.bridge.functions.ScoreProgram`."""

    def __init__(self, backend: JaxBackend, functions: Functions, losses: Sequence[str]) -> None:
        self.backend, self.functions, self.losses = backend, functions, frozenset(losses)
        self._forward = backend.compile_function(self._trace_forward)
        self._backward = backend.compile_function(self._trace_backward)
        self._evaluation = backend.compile_function(self._trace_evaluation)
        self._outputs = backend.compile_function(functions.outputs)

    def _trace_forward(self, *arguments: Any) -> tuple[tuple[Any, Any, Any], Residuals]:
        params, state, batch, entropy = arguments

        def differentiated(params: Arrays) -> tuple[Arrays, tuple[Any, Any, Any]]:
            returned = self.functions.score(params, state, batch, entropy)
            return self._select_losses(returned.scores), (returned.scores, returned.state, returned.outputs)

        _, pull, returned = jax.vjp(differentiated, params, has_aux=True)
        leaves, structure = jax.tree.flatten(pull)
        numbers = {id(argument): number for number, argument in enumerate(jax.tree.leaves(arguments))}
        shared = tuple(numbers.get(id(leaf)) for leaf in leaves)
        kept = [leaf for leaf, number in zip(leaves, shared, strict=True) if number is None]
        return returned, Residuals(kept, structure, shared)

    def _select_losses(self, scores: Any) -> Arrays:
        """Return the numerators of the losses that can be differentiated."""
        found = {}
        for name in self.losses.intersection(scores if isinstance(scores, dict) else ()):
            values: Array = get_numerators(scores[name])
            if getattr(values, "ndim", 0) == 1 and jnp.issubdtype(values.dtype, jnp.floating):
                found[name] = values
        return found

    def _trace_backward(self, arguments: Any, residuals: Residuals, cotangents: Arrays) -> Arrays:
        given, kept = jax.tree.leaves(arguments), iter(residuals.kept)
        leaves = [next(kept) if number is None else given[number] for number in residuals.shared]
        gradients: Arrays = jax.tree.unflatten(residuals.structure, leaves)(cotangents)[0]
        # JAX's derivative by a complex number is the conjugate of the direction of steepest ascent.
        return {name: jnp.conj(gradient) for name, gradient in gradients.items()}

    def _trace_evaluation(self, params: Arrays, state: Arrays, batch: Batch) -> tuple[Any, Any]:
        returned = self.functions.score(params, state, batch, None)
        return returned.scores, returned.outputs

    def _put_batch(self, batch: Batch) -> Batch:
        """Return a batch on the device, whose dataclasses JAX knows from now on."""
        while unknown := {type(leaf) for leaf in jax.tree.leaves(batch) if dataclasses.is_dataclass(leaf)}:
            for cls in unknown:
                jax.tree_util.register_dataclass(cls)
        return jax.device_put(batch, self.backend.device)

    def score_for_training(
        self, params: Arrays, state: Arrays, batch: Batch, entropy: NDArray[Any]
    ) -> tuple[Returned, Pullback]:
        arguments = (params, state, self._put_batch(batch), entropy)
        returned, residuals = self._forward(*arguments)
        await_arrays(returned)

        def pull_back(cotangents: Mapping[str, Tensor]) -> Arrays:
            given = {name: self._import_cotangent(tensor) for name, tensor in cotangents.items()}
            gradients: Arrays = self._backward(arguments, residuals, given)
            await_arrays(gradients)
            return gradients

        return Returned(*returned), pull_back

    def _import_cotangent(self, tensor: Tensor) -> Array:
        # Few numbers: by numpy, which has no bfloat16, it takes a fifth of the time that DLPack would.
        return self.backend.import_tensor(tensor) if tensor.dtype == torch.bfloat16 else tensor.numpy(force=True)

    def score_for_evaluation(self, params: Arrays, state: Arrays, batch: Batch) -> Returned:
        found = self._evaluation(params, state, self._put_batch(batch))
        await_arrays(found)
        scores, outputs = found
        return Returned(scores, state, outputs)

    def compute_outputs(self, params: Arrays, state: Arrays, batch: Batch) -> Any:
        outputs = self._outputs(params, state, self._put_batch(batch))
        await_arrays(outputs)
        return outputs


def await_arrays(tree: Any) -> None:
    """Wait until a tree of arrays is computed, and what it was computed from is not read any more."""
    jax.block_until_ready(tree)  # type: ignore[no-untyped-call]


def cut_gradient(flats: Sequence[Array], place: Place) -> Array:
    """Return a gradient out of the flat arrays; it is traced."""
    size = int(np.prod(place.shape, dtype=np.int64))
    return flats[place.flat][place.offset : place.offset + size].reshape(place.shape)
