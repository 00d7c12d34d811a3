"""Errors for loops whose backward passes and steps do not fit together, on one rank or between ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hvdtrain.system.errors import RunError, UserError


def second_gradient_error(name: str, passes: int, *, announced: bool) -> Exception:
    """Return the error for a gradient that came after it was sent.

    Args:
        name: of the parameter.
        passes: backward passes that make a step.
        announced: whether the caller has announced this pass as the step's last.
    """
    checkpointing = "activation checkpointing of a block that is used more than once needs use_reentrant=False"
    if announced:
        return UserError(f"a gradient of {name} came in two parts, the second after it was sent: {checkpointing}")
    return RuntimeError(
        f"a gradient of {name} came after its exchange had begun: more backward passes than "
        f"backward_passes_per_step={passes}; call optimizer.step() or raise that number, run backward passes "
        f"for another optimizer within `with optimizer.paused():` of this one; and {checkpointing}"
    )


def check_same_round(heads: Sequence[torch.Tensor], size: int, *, averaged: bool) -> None:
    """Raise RunError if the ranks' gradients that were added up are not of the same step.

    Args:
        heads: (2,) each: what travelled with the gradients; [1] is 0 or 1 on each rank, after every step the other,
            and the other for gradients that a rank drops.
        size: the number of ranks.
        averaged: whether these are means over ranks, or sums.
    """
    for head in heads:
        ranks = float(head[1]) * (size if averaged else 1)
        if 0.25 < ranks < size - 0.25:
            raise RunError(
                "zero_grad() has dropped gradients on some ranks that others use in step(): call backward(), step() "
                "and zero_grad() equally often on all ranks. A rank without examples calls step() as well; to skip a "
                "step, agree on it first, e.g. by hvd.allreduce"
            )
