"""DistributedOptimizer: an optimizer of Keras whose gradients are averaged over ranks, for `model.fit` and own loops.

    model.fit               optimizer.apply; on JAX stateless_apply, which calls it
      LossScaleOptimizer    are the gradients finite on all ranks? else all skip the step    `check_finite_on_all_ranks`
        the optimizer       gradients -> `GradientReduction` -> its own class's apply        `DistributedMethods`

The object stays what it is; its class becomes one of the same name that has `DistributedMethods` in front. So its state
is kept, and a saved model is one of Keras alone.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import keras

from hvdtrain.comm import collectives
from hvdtrain.compression.spec import parse_compression
from hvdtrain.exchange.buckets import ExchangeConfig
from hvdtrain.keras.host_calls import KerasTensor
from hvdtrain.keras.reduction import GradientReduction
from hvdtrain.keras.world import check_jax_threads
from hvdtrain.system.errors import UserError

_REDUCTION = "gradient_reduction"  # of an optimizer, in its __dict__: Keras replaces what it tracks by copies


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    *,
    average: bool = True,
    compression: str = "none",
    seed: int = 0,
    process_set: collectives.Group = None,
    bucket_bytes: int | None = None,
    name: str = "",
) -> keras.optimizers.Optimizer:
    """Wrap an optimizer of Keras 3 so that it applies the mean (or the sum) of all ranks' gradients.

    The loss of `model.fit` is a mean over this rank's batch, so the mean of the gradients is that of the whole batch if
    all ranks' batches are of one size. All ranks need the same number of batches, too: a rank that has more waits for
    gradients of the others (`hvdtrain.keras.callbacks.BroadcastGlobalVariablesCallback` compares the numbers).

    Gradients are clipped after they are averaged. With `gradient_accumulation_steps` only the accumulated gradients
    travel. A `LossScaleOptimizer` around it, as of mixed_float16, or in it, skips a step if any rank's gradients are
    not finite.

    Args:
        optimizer: it is changed and returned. A LossScaleOptimizer, too: its inner optimizer is wrapped.
        average: whether the gradients are averaged; else summed.
        compression: a specification (`hvdtrain.compression.spec`), such as "fp16" or "powersgd:4".
        seed: of compression's randomness, the same on all ranks.
        process_set: the ranks that train this model together; None: all.
        bucket_bytes: about as much is sent at once; None: 8 MiB on CPUs, 25 MiB on GPUs.
        name: before those of its collectives, if gradients of several optimizers are exchanged at the same time.

    Raises:
        UserError: it is a DistributedOptimizer already, the compression is not valid, or, on JAX, XLA has one thread.
    """
    inner = optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise UserError(
            f"hvdtrain.keras.DistributedOptimizer takes an optimizer of Keras 3, not {type(optimizer).__name__}: "
            "for instance keras.optimizers.SGD(0.1)"
        )
    if is_distributed(inner):
        raise UserError(f"this {type(inner).__name__} is a DistributedOptimizer already: wrap it only once")
    spec = parse_compression(compression)
    config = ExchangeConfig(
        average=average, spec=spec, seed=seed, name=name, group=process_set, bucket_bytes=bucket_bytes
    )
    if collectives.size(process_set) > 1:
        if keras.backend.backend() == "jax":
            check_jax_threads()
        _agree_on_finite_gradients()
    own = type(inner)
    body = {"__module__": own.__module__, "__qualname__": own.__qualname__, "exchange_config": config}
    object.__setattr__(inner, "__class__", type(own.__name__, (DistributedMethods, own), body))
    return optimizer


class DistributedMethods:
    """What a distributed optimizer's class has in front of the optimizer's own.

    Attributes:
        exchange_config: how its gradients are summed.
    """

    exchange_config: ExchangeConfig

    def apply(self: Any, grads: Sequence[KerasTensor], trainable_variables: Any = None) -> None:
        """Reduce the gradients over ranks, and update the variables. All ranks call it."""
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        reduction = find_reduction(self)
        if reduction.is_needed and not self.gradient_accumulation_steps and len(grads):
            grads = reduction.reduce_gradients(grads, variables)
        super().apply(grads, variables if trainable_variables is not None else None)  # type: ignore[misc]

    def _backend_apply_gradients(self: Any, grads: Sequence[KerasTensor], trainable_variables: Sequence[Any]) -> None:
        vars(self)["applied_variables"] = trainable_variables
        super()._backend_apply_gradients(grads, trainable_variables)  # type: ignore[misc]

    def _clip_gradients(self: Any, grads: list[KerasTensor]) -> list[KerasTensor]:
        """Reduce accumulated gradients: Keras clips them when there are enough, on JAX also when there are not."""
        reduction = find_reduction(self)
        if reduction.is_needed and self.gradient_accumulation_steps:
            variables = vars(self)["applied_variables"]
            if keras.backend.backend() == "jax":
                import jax

                is_update = (self._iterations.value + 1) % self.gradient_accumulation_steps == 0
                reduce = functools.partial(reduction.reduce_gradients, variables=variables)
                grads = jax.lax.cond(is_update, reduce, lambda gradients: gradients, list(grads))
            else:
                grads = reduction.reduce_gradients(grads, variables)
        return super()._clip_gradients(grads)  # type: ignore[misc, no-any-return]


def find_reduction(optimizer: Any) -> GradientReduction:
    """Return the exchange of a distributed optimizer's gradients, which is made when it is first asked for."""
    reduction: GradientReduction = vars(optimizer).setdefault(_REDUCTION, GradientReduction(optimizer.exchange_config))
    return reduction


def is_distributed(optimizer: Any) -> bool:
    """Return whether an optimizer, or the one in a LossScaleOptimizer, is a DistributedOptimizer."""
    return isinstance(getattr(optimizer, "inner_optimizer", optimizer), DistributedMethods)


def _agree_on_finite_gradients() -> None:
    """Make LossScaleOptimizer ask all ranks if its optimizer is distributed: `compile` puts one around it by itself."""
    stock = keras.optimizers.LossScaleOptimizer.check_finite
    if getattr(stock, "__wrapped__", None) is not None:
        return

    @functools.wraps(stock)
    def check_finite_on_all_ranks(self: Any, grads: Sequence[KerasTensor]) -> KerasTensor:
        finite = stock(self, grads)
        if not is_distributed(self):
            return finite
        reduction = find_reduction(self.inner_optimizer)
        return reduction.all_ranks(finite) if reduction.is_needed else finite

    keras.optimizers.LossScaleOptimizer.check_finite = check_finite_on_all_ranks


def load_model(path: str | os.PathLike[str], *, compression: str = "none", **kwargs: Any) -> keras.Model:
    """Load a model that Keras saved, and make its optimizer, state included, a DistributedOptimizer.

    `keras.saving.load_model` loads it with its plain optimizer, for other uses than training on all ranks.

    Args:
        path: what `model.save` wrote; every rank reads it.
        compression: as of `DistributedOptimizer`.
        kwargs: more of `keras.saving.load_model`.
    """
    model = keras.saving.load_model(path, **kwargs)
    if model.optimizer is not None:
        DistributedOptimizer(model.optimizer, compression=compression)
    return model
