"""How the gradients of a recipe's losses travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from hvdtrain.recipe.framework import ExchangeReport
from hvdtrain.torch.optimized_loss import OptimizedLoss


def describe_exchanges(losses: Sequence[OptimizedLoss], sparsity: float | None) -> ExchangeReport:
    """Return how gradients travel; with several losses, each bucket with the name of its loss."""
    buckets: list[Mapping[str, object]] = []
    advisor = None
    for loss in losses:
        exchange, of_loss = loss.optimizer.exchange, {"loss": loss.name} if loss.settings.several else {}
        buckets += [asdict(bucket) | of_loss for bucket in exchange.describe_buckets()] if exchange else []
        advisor = advisor or (loss.bucketed_exchange and loss.bucketed_exchange.advisor)
    return ExchangeReport(buckets, advisor.advice.to_json() if advisor and advisor.advice else None, sparsity)
