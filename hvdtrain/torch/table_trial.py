"""Whether an optimizer updates each row of an embedding table alone: found out by trying copies of it on a few rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.sandbox import preserve_random_state
from hvdtrain.torch.shard_trial import NUM_STEPS, OptimizerCopy
from hvdtrain.torch.tensors import has_same_bits

TRIAL_ROWS = 6  # of each table


def check_row_updates(recipe_name: str, optimizers: Iterable[torch.optim.Optimizer], dealt: DealtTables | None) -> None:
    """Raise UserError on all ranks for an optimizer that does not update each row of a table alone, if any are dealt.

    optimizers: not wrapped yet; copies of them are tried.
    """
    if dealt is not None:
        collectives.on_all_ranks("tables.trial", lambda: _try_optimizers(recipe_name, optimizers, dealt))


def _try_optimizers(recipe_name: str, optimizers: Iterable[torch.optim.Optimizer], dealt: DealtTables) -> None:
    with preserve_random_state():
        torch.manual_seed(0)
        for optimizer in optimizers:
            _check_row_updates(f"{recipe_name}.optimizer: {type(optimizer).__name__}", optimizer, dealt)


def _check_row_updates(whose: str, optimizer: torch.optim.Optimizer, dealt: DealtTables) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sparse = {module.weight: module.sparse for module in dealt.modules if module.weight.requires_grad}

    def draw() -> list[Tensor]:
        return [p.new_zeros(0) if p not in sparse else torch.randn_like(p[:TRIAL_ROWS]).detach() for p in params]

    def give(gradients: Sequence[Tensor]) -> list[Tensor]:
        return [g.to_sparse(1) if sparse.get(p) and len(g) else g for p, g in zip(params, gradients, strict=True)]

    def cut(tensors: Sequence[Tensor], first: bool) -> list[Tensor]:
        cuts = [(len(x) // 2, len(x))[i % 2] for i, x in enumerate(tensors)]
        return [x[:n] if first else x[n:] for x, n in zip(tensors, cuts, strict=True)]

    try:
        originals = draw()
        whole = OptimizerCopy(optimizer, params, originals)
        parts = [OptimizerCopy(optimizer, params, cut(originals, first)) for first in (True, False)]
        for _ in range(NUM_STEPS):
            gradients = draw()
            gradients = [g * (torch.arange(len(g)) % 3 > 0).to(g).unsqueeze(1) if len(g) else g for g in gradients]
            whole.step(give(gradients))
            for part, first in zip(parts, (True, False), strict=True):
                part.step(give(cut(gradients, first)))
        same = all(
            has_same_bits(p.detach(), torch.cat(own).detach())
            for p, *own in zip(whole.params, *(x.params for x in parts), strict=True)
        )
    except Exception as error:
        raise UserError(
            f"{whose} cannot update some rows of a table alone ({type(error).__name__}: {error}); give --tables whole"
        ) from error
    if not same:
        raise UserError(
            f"{whose} does not update each row of a table alone: use SGD, Adagrad, Adam or SparseAdam, or give "
            "--tables whole"
        )
