"""Recipes whose loss is over the examples of all ranks, and the same losses over a whole batch, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from hvdtrain.comm import collectives
from hvdtrain.recipe.order import part_bounds
from hvdtrain.torch import Recipe, SyncBatchNorm, all_gather, all_reduce, option, own_rows


@dataclass(kw_only=True)
class Pairs(Recipe):
    """Two views of each example, (6,) float64."""

    examples: int = option(41, "training examples")
    num_evaluated: int = option(11, "evaluation examples")
    epochs: int = 2
    batch_size: int = 8
    lr: float = 0.2

    def dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(len(split))
        count = self.examples if split == "train" else self.num_evaluated
        base, noise = (torch.randn(count, 2, 6, generator=made, dtype=torch.float64) for _ in range(2))
        return TensorDataset(base[:, 0] + 0.3 * noise[:, 0], base[:, 0] + 0.3 * noise[:, 1])

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        return F.normalize(model(x), dim=1)

    def whole_batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """(B,) the losses of a batch that is all here."""
        raise NotImplementedError


class SimCLR(Pairs):
    """NT-Xent (Chen et al., 2020): the negatives of a view are all other views."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        views = torch.stack([self.embed(model, x) for x in batch], 1)  # (B, 2, d)
        everyone = all_gather(views)
        own = torch.arange(len(everyone))[own_rows(everyone)]
        logits = views.flatten(0, 1) @ everyone.flatten(0, 1).T / 0.5  # (2B, 2N)
        itself = (2 * own[:, None] + torch.arange(2)).flatten()
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        losses = F.cross_entropy(logits, itself ^ 1, reduction="none")
        return {"loss": losses.view(-1, 2).mean(1)}

    def whole_batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        first, second = (self.embed(model, x) for x in batch)
        views = torch.cat([first, second])
        similarity = (views @ views.T / 0.5).fill_diagonal_(-torch.inf)
        positives = torch.cat([torch.arange(len(first)) + len(first), torch.arange(len(first))])
        losses = -similarity.log_softmax(1)[torch.arange(len(views)), positives]
        return (losses[: len(first)] + losses[len(first) :]) / 2


class CLIP(Pairs):
    """Image-text contrast (Radford et al., 2021)."""

    def model(self) -> nn.Module:
        class Towers(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.image, self.text = Pairs.model(self), Pairs.model(self)  # type: ignore[arg-type]
                self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        return Towers()

    def embed_pairs(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return self.embed(model.image, batch[0]) * model.scale.exp(), self.embed(model.text, batch[1])

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        images, texts = self.embed_pairs(model, batch)
        all_images, all_texts = all_gather(images), all_gather(texts)
        own = torch.arange(len(all_texts))[own_rows(all_texts)]
        one = F.cross_entropy(images @ all_texts.T, own, reduction="none")
        other = F.cross_entropy(texts @ all_images.T, own, reduction="none")
        return {"loss": (one + other) / 2, "right": ((images @ all_texts.T).argmax(1) == own).double()}

    def whole_batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        images, texts = self.embed_pairs(model, batch)
        logits, own = images @ texts.T, torch.arange(len(images))
        losses = [F.cross_entropy(scores, own, reduction="none") for scores in (logits, logits.T)]
        return (losses[0] + losses[1]) / 2


class Spread(Pairs):
    """Distances from the mean over the whole batch, by all_reduce; the gradient of which flows through the mean."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        y = model(batch[0])
        total = all_reduce(torch.cat([y.sum(0), y.new_tensor([len(y)])]))
        mean = total[:-1] / total[-1]
        return {"loss": (y - mean).square().sum(1) + (model(batch[1]) - 1).square().sum(1)}

    def whole_batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        y = model(batch[0])
        return (y - y.mean(0)).square().sum(1) + (model(batch[1]) - 1).square().sum(1)


@dataclass(kw_only=True)
class Norms(Pairs):
    """Batch norm on (B, 3, 2), then on (B, 5), with and without weights."""

    examples: int = option(42, "training examples")
    single: bool = option(False, "in float32")
    checkpointed: bool = option(False, "compute the model again in backward")
    own: bool = option(False, "with hvdtrain's SyncBatchNorm in the model")
    momentum: float | None = option(0.1, "of the running statistics; None: their mean")

    def model(self) -> nn.Module:
        made = nn.Sequential(
            nn.Unflatten(1, (3, 2)),
            nn.BatchNorm1d(3, momentum=self.momentum),
            nn.Flatten(),
            nn.Linear(6, 5),
            nn.BatchNorm1d(5, affine=False),
            nn.Tanh(),
            nn.Linear(5, 1),
        )
        made = made.float() if self.single else made.double()
        return SyncBatchNorm.convert(made) if self.own else made

    def dataset(self, split: str) -> TensorDataset:
        tensors = (100 + 3 * t for t in super().dataset(split).tensors)  # far from zero: E[x^2] - E[x]^2 would cancel
        return TensorDataset(*(t.float() if self.single else t for t in tensors))

    def whole_batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        y = checkpoint(model, batch[0], use_reentrant=False) if self.checkpointed else model(batch[0])
        return (y.squeeze(1).to(batch[1].dtype) - (batch[1].mean(1) - 100)).square()

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": Norms.whole_batch_loss(self, model, batch)}


class Partial(Norms):
    """In training, the losses of the examples of rank 1 of 2 are constant; batch norm makes others depend on them."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        losses = Norms.whole_batch_loss(self, model, batch)
        return {"loss": losses.detach() * 0 if model.training and collectives.rank() == 1 else losses}

    def whole_batch_loss(self, model: nn.Module, batch: Any) -> Tensor:
        losses = super().whole_batch_loss(model, batch)
        return losses * (torch.arange(len(losses)) < part_bounds(len(losses), 0, 2)[1]) if model.training else losses


@dataclass(kw_only=True)
class Wrong(Pairs):
    """Calls that cannot be right."""

    how: str = option("", "what it does")

    def __post_init__(self) -> None:
        self.calls = 0

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        self.calls += 1
        y = model(batch[0])
        match self.how:
            case "number":
                all_gather(3.0)  # type: ignore[arg-type]
            case "scalar":
                all_gather(y.sum())
            case "per example":
                y = y + all_reduce(y[:, 0])[:, None]
            case "more":
                all_gather(y)
                if self.calls > 2:
                    all_gather(y)
            case "fewer":
                if self.calls <= 2:
                    all_gather(y)
            case "shapes":
                all_gather(y[:, : 4 - collectives.rank() * (self.calls > 1)])
            case "rows":
                own_rows(y)
            case "horovod":
                y = y - hvd.allgather(y, name="mine").mean(0)
            case "fine":
                all_gather(y)
        return {"loss": y.square().sum(1)}
