"""The same values of Keras variables on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import ConsistentPart, check_agreement

SEED_STATE = "seed_generator_state"  # Keras's name of a random generator's variable


def broadcast_variables(variables: Sequence[Any], root_rank: int = 0, process_set: collectives.Group = None) -> None:
    """Overwrite Keras variables with the root's, but those of random generators: ranks drop different units.

    Args:
        variables: for instance `model.variables + model.optimizer.variables`, in the same order on all ranks.
        root_rank: a rank among all, even if a process_set is given; it must be in it.
        process_set: the ranks that take part; None: all.

    Raises:
        UserError: on all ranks, before anything is overwritten, if their variables differ in number, shape or type.
    """
    if collectives.size(process_set) == 1:
        return
    sent = [variable for variable in variables if variable.name != SEED_STATE]
    described = {f"variable {number}": describe_variable(variable) for number, variable in enumerate(sent, 1)}
    difference = "{who}: {key} is {here}, {base} has {there}"
    check_agreement("keras.variables", [ConsistentPart("variables", described, difference)], process_set)
    is_root = collectives.rank() == root_rank
    arrays = [np.asarray(keras.ops.convert_to_numpy(variable), order="C") for variable in sent]
    data = b"".join(array.tobytes() for array in arrays) if is_root else None
    received = collectives.broadcast_bytes(data, "keras.variables.values", root_rank, process_set)
    if is_root:
        return
    begin = 0
    for variable, array in zip(sent, arrays, strict=True):
        part = received[begin : begin + array.nbytes]
        variable.assign(np.frombuffer(part, array.dtype).reshape(array.shape).copy())
        begin += array.nbytes


def describe_variable(variable: Any) -> str:
    """Return a variable's type, shape and name without numbers, which depend on what else the process has made."""
    name = variable.name.rstrip("0123456789").rstrip("_")
    return f"{name} {keras.backend.standardize_dtype(variable.dtype)} {tuple(variable.shape)}"
