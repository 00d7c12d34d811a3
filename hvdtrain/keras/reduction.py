"""Gradients of Keras variables, averaged over ranks by hvdtrain's exchange.

    gradients -> one flat tensor for each type -> the host -> buckets, compressed or not -> one flat tensor -> gradients

On the torch backend the gradients are in the host's hands already, and are copied into the buckets only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import torch
from keras import ops

from hvdtrain.comm import collectives
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.buckets import ExchangeConfig
from hvdtrain.keras.host_calls import KerasTensor, call_on_host
from hvdtrain.system.errors import RunError, UserError


@dataclass(frozen=True)
class GradientSpec:
    """A variable's gradient, the same on all ranks; dtype: as torch calls it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def make_parameter(self, device: torch.device) -> torch.nn.Parameter:
        """Return a parameter that stands for the variable in an exchange, without memory of its own."""
        value = torch.zeros((), dtype=getattr(torch, self.dtype), device=device).expand(self.shape)
        return torch.nn.Parameter(value, requires_grad=value.is_floating_point())


class GradientReduction:
    """The exchange of one optimizer's gradients.

    Attributes:
        config: how they are summed.
        exchange: of the variables that the last step had; None before the first.
    """

    def __init__(self, config: ExchangeConfig) -> None:
        self.config = config
        self.exchange: BucketedExchange | None = None
        self._specs: Sequence[GradientSpec] = ()
        self._params: list[torch.nn.Parameter] = []

    @property
    def is_needed(self) -> bool:
        """Whether there are other ranks."""
        return collectives.size(self.config.group) > 1

    def reduce_gradients(self, gradients: Sequence[KerasTensor], variables: Sequence[Any]) -> list[KerasTensor]:
        """Return the gradients' means or sums over ranks; None if no rank has a gradient of the variable.

        Args:
            gradients: this rank's, None for a variable that its loss does not depend on.
            variables: Keras's, in the same order on all ranks.

        Raises:
            UserError: a variable's gradient is no gradient, as in float8 training.
        """
        for variable in variables:
            if getattr(variable, "overwrite_with_gradient", False):
                raise UserError(
                    f"{variable.path} takes its value from its gradient, as float8 training does, which cannot be "
                    "averaged over ranks: train with another dtype policy"
                )
        gradients = [None if gradient is None else densify(gradient) for gradient in gradients]
        specs = make_specs(gradients, variables)
        if keras.backend.backend() == "torch":
            with torch.no_grad():
                return list(self.exchange_tensors(specs, gradients))
        return self._reduce_flats(gradients, specs)

    def _reduce_flats(self, gradients: Sequence[KerasTensor], specs: list[GradientSpec]) -> list[KerasTensor]:
        present = [number for number, gradient in enumerate(gradients) if gradient is not None]
        dtypes = sorted({specs[number].dtype for number in present})
        layout = [[number for number in present if specs[number].dtype == dtype] for dtype in dtypes]
        flats = [ops.concatenate([ops.reshape(gradients[n], (-1,)) for n in group]) for group in layout]
        results: list[KerasTensor] = [None] * len(specs)
        sums = call_on_host(partial(self.exchange_flats, specs, layout), flats)
        for group, flat in zip(layout, sums, strict=True):
            ends = list(itertools.accumulate(math.prod(specs[number].shape) for number in group))
            for number, piece in zip(group, ops.split(flat, ends[:-1]), strict=True):
                results[number] = ops.reshape(piece, specs[number].shape)
        return results

    def exchange_flats(
        self, specs: Sequence[GradientSpec], layout: Sequence[Sequence[int]], flats: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the means or sums over ranks of flat tensors.

        Args:
            specs: of all variables.
            layout: the numbers of the variables in each flat tensor.
            flats: one for each type; not changed.

        Raises:
            RunError: another rank has a gradient of a variable that this one has none of.
        """
        gradients: list[torch.Tensor | None] = [None] * len(specs)
        for group, flat in zip(layout, flats, strict=True):
            pieces = torch.split(flat, [math.prod(specs[number].shape) for number in group])
            for number, piece in zip(group, pieces, strict=True):
                gradients[number] = piece.view(specs[number].shape)
        sums = self.exchange_tensors(specs, gradients)
        for spec, own, total in zip(specs, gradients, sums, strict=True):
            if own is None and total is not None:
                raise RunError(
                    f"rank {collectives.rank()} has no gradient of {spec.name} and another rank has one: "
                    "compute the same loss on all ranks"
                )
        return [torch.cat([sums[number].reshape(-1) for number in group]) for group in layout]  # type: ignore[union-attr]

    def exchange_tensors(
        self, specs: Sequence[GradientSpec], gradients: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Return the means or sums over ranks, in memory that the next call overwrites; one call for each step."""
        if self.exchange is None or self._specs != specs:
            self._make_exchange(specs, next(gradient.device for gradient in gradients if gradient is not None))
        assert self.exchange is not None
        for param, gradient in zip(self._params, gradients, strict=True):
            param.grad = gradient
        self.exchange.finish_exchange()
        return [param.grad for param in self._params]

    def _make_exchange(self, specs: Sequence[GradientSpec], device: torch.device) -> None:
        if self.exchange is not None:
            self.exchange.close()
        self._specs = specs
        self._params = [spec.make_parameter(device) for spec in specs]
        named = [(spec.name, param) for spec, param in zip(specs, self._params, strict=True)]
        self.exchange = BucketedExchange(named, self.config)

    def all_ranks(self, flag: KerasTensor) -> KerasTensor:
        """Return whether a flag, a scalar of the backend's type bool, is true on all ranks."""
        (misses,) = call_on_host(self._sum_misses, [ops.reshape(ops.cast(ops.logical_not(flag), "int32"), (1,))])
        return ops.equal(misses[0], 0)

    def _sum_misses(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        name = f"{self.config.name}gradients.misses"
        return [collectives.wait(collectives.all_reduce_async_(tensors[0].clone(), name, group=self.config.group))]


def densify(gradient: KerasTensor) -> KerasTensor:
    """Return a gradient as a dense tensor: rows of an embedding's (IndexedSlices of TensorFlow) with zeros between."""
    return ops.convert_to_tensor(gradient) if keras.backend.backend() == "tensorflow" else gradient


def make_specs(gradients: Sequence[KerasTensor], variables: Sequence[Any]) -> list[GradientSpec]:
    """Return what is known of the gradients before they are computed; names that occur twice get a number."""
    specs, seen = [], dict[str, int]()
    for gradient, variable in zip(gradients, variables, strict=True):
        name = getattr(variable, "path", variable.name).replace("/", ".")
        seen[name] = seen.get(name, 0) + 1
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
        dtype = keras.backend.standardize_dtype((variable if gradient is None else gradient).dtype)
        specs.append(GradientSpec(unique, tuple(variable.shape), dtype))
    return specs
