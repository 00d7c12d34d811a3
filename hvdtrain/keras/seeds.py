"""The states of Keras's seed generators, derived from what hvdtrain draws for a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hvdtrain.bridge.functions import Array, Entropy

GOLDEN_RATIO = 0x9E3779B9  # 2^32 divided by it: what generators of neighbouring numbers get is far apart


def derive_seeds(variables: Sequence[Any], entropy: Entropy | None) -> list[tuple[Any, Array]]:
    """Return the states of some seed generators, each with its variable.

    A state is two integers; a generator counts the second one up. Both are at most 31 bits long, which is all that
    each of the backends takes.

    Args:
        variables: the generators' variables (2,).
        entropy: (2,) uint32; None: in an evaluation, the same each time.
    """
    if not variables:
        return []
    ops, wide = keras.ops, "uint32" if keras.config.backend() == "jax" else "int64"
    numbers = np.arange(1, len(variables) + 1, dtype=np.uint64) * GOLDEN_RATIO % 2**31
    offsets = np.stack([numbers, np.zeros_like(numbers)], axis=1).astype(wide)  # (generators, 2)
    drawn = ops.cast(np.zeros(2, np.uint32) if entropy is None else entropy, wide)
    states = ops.bitwise_and(ops.convert_to_tensor(offsets) + drawn, ops.convert_to_tensor(np.asarray(2**31 - 1, wide)))
    return [(variable, ops.cast(states[i], variable.dtype)) for i, variable in enumerate(variables)]
