"""What layers add to the loss of a batch, as a score of its own that is differentiated with the loss.

Minimized is   sum of losses / sum of denominators + R   over all examples, where R is what `add_loss` and regularizers
give. Gradients are of sums over the examples of a batch, so each example's loss gets the gradient of R times its
denominator (1 if there are none) and keeps its value:

    loss_i + denominator_i * (R - stop_gradient(R))

On any number of ranks and micro-batches the gradient of R then enters once, and the column `loss` is what `score` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from hvdtrain.bridge.functions import Array
from hvdtrain.keras.recipe import Scores
from hvdtrain.keras.scope import PureScope
from hvdtrain.system.errors import UserError

REGULARIZATION = "regularization"


def sum_regularization(model: Any, scope: PureScope) -> Array | None:
    """Return the sum () float32 of what was added to the loss in a scope, and of the regularizers; None: of nothing."""
    terms = [*scope.added_losses]
    terms += [v.regularizer(v) for v in model.trainable_variables if v.regularizer is not None]
    return sum(ops.cast(ops.sum(term), "float32") for term in terms) if terms else None


def add_regularization(caller: str, scores: Scores, losses: Sequence[str], regularization: Array) -> Scores:
    """Return scores with the column `regularization`, whose gradient comes with that of each loss.

    Args:
        caller: what has returned the scores, for messages.
        scores: by name: (B,) or (B, k), or a pair of numerators and denominators.
        losses: the names of those that are minimized.
        regularization: () float32.
    """
    if REGULARIZATION in scores:
        raise UserError(
            f"{caller} returned a score {REGULARIZATION!r}, which is the name of what layers and regularizers add to "
            "the loss: rename it"
        )
    gradient_only = regularization - ops.stop_gradient(regularization)
    changed, rows = dict(scores), None
    for name in losses:
        if name not in scores:
            continue  # which is refused, or allowed, for all frameworks alike
        value = scores[name]
        pair = isinstance(value, tuple)
        numerators = ops.convert_to_tensor(value[0] if pair else value)
        if numerators.ndim == 0:
            continue
        added = ops.cast(gradient_only, numerators.dtype)
        if pair:
            added = added * ops.stop_gradient(ops.cast(value[1], numerators.dtype))
        rows = numerators if rows is None else rows
        changed[name] = (numerators + added, value[1]) if pair else numerators + added
    if rows is not None:
        changed[REGULARIZATION] = ops.broadcast_to(regularization, (ops.shape(rows)[0],))
    return changed
