"""The update of sharded optimizers: each rank's pieces, then the parameters on all ranks.

step_pieces          of each optimizer: its pieces step, and what they have become is sent
await_updates        all ranks' have arrived: until then an update can be undone, if parts are mirrored
conclude_updates     parameters are overwritten, and hooks of the steps are called
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.torch.piece_owner import use_pieces
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.update_undo import UpdateUndo


@contextlib.contextmanager
def step_pieces(shards: OptimizerShards | None) -> Iterator[None]:
    """Let a sharded optimizer step, and start gathering what it has updated, until `await_updates`. None: it is not."""
    if shards is None:
        yield
        return
    if shards.exchange is None:
        shards.take_gradients()
    shards.prepare_update()
    shards.undo = UpdateUndo(shards.optimizer, shards.held_values) if shards.can_undo else None
    hooks: Any = vars(shards.optimizer)["_optimizer_step_post_hooks"]
    kept, steps = dict(hooks), list[object]()
    hooks.clear()
    hooks[0] = lambda *args: steps.append(args)  # a loss scale may skip the step
    try:
        with use_pieces(shards):
            yield
    finally:
        hooks.clear()
        hooks.update(kept)
    if steps:
        shards.start_gathering(kept.values())


def await_updates(all_shards: Sequence[OptimizerShards]) -> list[tuple[nn.Parameter, Tensor]]:
    """Bring every rank what the others have updated of each of these optimizers; all ranks call this.

    If updates can be undone no parameter is overwritten: all have made their updates only if all have arrived.

    Returns:
        Parameters that are to be overwritten, with their new values.
    """
    arrived: list[tuple[nn.Parameter, Tensor]] = []
    for shards in all_shards:
        for gathered in shards.iterate_gathered():
            arrived += gathered
            if shards.undo is None:
                overwrite_parameters(arrived)
                arrived.clear()
    return arrived


def conclude_updates(all_shards: Sequence[OptimizerShards], arrived: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Take over what `await_updates` has returned."""
    overwrite_parameters(arrived)
    for shards in all_shards:
        shards.conclude_update()


def overwrite_parameters(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Give parameters new values."""
    if pairs:
        torch._foreach_copy_([p.detach() for p, _ in pairs], [value for _, value in pairs])
