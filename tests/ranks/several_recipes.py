"""Recipes with several optimizers, and the same training by plain torch in one process, in float64."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hvdtrain
from hvdtrain.recipe import schedule
from hvdtrain.recipe.order import iterate_batches
from hvdtrain.torch import Recipe, all_gather

EXAMPLES, BATCH = 43, 8  # the last batch of an epoch has 3 examples: fewer than 4 ranks
BUILT: list[nn.Module] = []  # the models that recipes have made in this process


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
        self.d = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


@dataclass(kw_only=True)
class Duel(Recipe):
    """Two small networks against each other, without detach(): each loss reaches the parameters of both."""

    best = ("score_d", "max")

    turns: str = "both"  # of each step, one after the other: "d", "g", "both"
    generator_loss: str = "loss_g"
    epochs: int = 2
    batch_size: int = BATCH
    lr: float = 0.05
    schedule: str = "warmup:2 linear"

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        BUILT.append(Pair().double())
        return BUILT[-1]

    def dataset(self, split: str) -> TensorDataset:
        made = torch.Generator().manual_seed(1 if split == "train" else 2)
        count = EXAMPLES if split == "train" else 11
        return TensorDataset(*(torch.randn(count, n, generator=made, dtype=torch.float64) for n in (4, 3)))

    def optimizer(self, params: Any, named: Any) -> dict[str, torch.optim.Optimizer]:
        assert [p for _, p in named] == params

        def own(part: str) -> list[nn.Parameter]:
            return [p for name, p in named if name.startswith(f"{part}.")]

        return {
            "loss_d": torch.optim.SGD(own("d"), lr=self.lr, momentum=0.9),
            self.generator_loss: torch.optim.Adam(own("g"), lr=self.lr / 5),
        }

    def turn(self) -> str:
        turns = self.turns.split()
        return turns[self.now.step % len(turns)] if self.now.training else "both"

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        real, noise = batch
        on_real, on_fake = model.d(real)[:, 0], model.d(model.g(noise))[:, 0]
        scores = {
            "loss_d": (on_real - 1).square() + on_fake.square(),
            self.generator_loss: (on_fake - 1).square(),
            "score_d": (on_real > on_fake).double(),
        }
        left_out = {"both": None, "d": "loss_g", "g": "loss_d"}[self.turn()]
        return {name: score for name, score in scores.items() if name != left_out}


@dataclass(kw_only=True)
class SlowDuel(Duel):
    """In turns, and slowly until the fault file says "hurry"."""

    turns: str = "d g g"
    pause: float = 0.0
    fault: str = ""

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        if self.now.training and not (self.fault and Path(self.fault).exists()):
            time.sleep(self.pause)
        return super().score(model, batch)


@dataclass(kw_only=True)
class Weightless(Duel):
    """In step 3 the generator's loss has denominators of 0."""

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        scores = super().score(model, batch)
        weights = torch.full_like(scores["loss_g"], float(not (self.now.training and self.now.step == 2)))
        return scores | {"loss_g": (scores["loss_g"] * weights, weights)}


class Ratio(Duel):
    """The generator's loss is a mean with weights of its own."""

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        scores = super().score(model, batch)
        if "loss_g" in scores:
            weights = batch[1][:, 0].abs()
            scores["loss_g"] = scores["loss_g"] * weights, weights
        return scores


@dataclass(kw_only=True)
class SlowRatio(Ratio, SlowDuel):
    """The same, slowly, with a metric of the means."""

    def metrics(self, means: Any) -> dict[str, Any]:
        return {"sum_of_squares": means["loss"] ** 2 + means["score_d"] ** 2}


class Uneven(Duel):
    """Ranks train different losses in step 3."""

    def turn(self) -> str:
        if self.now.training and self.now.step == 2:
            return "d" if self.now.rank == 0 else "g"
        return super().turn()


class Unmeasured(Duel):
    """`best` is left as it is."""

    best = ("loss", "min")


class NoLoss(Duel):
    """No loss at all in step 2."""

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        scores = super().score(model, batch)
        return {"score_d": scores["score_d"]} if self.now.training and self.now.step == 1 else scores


class Missing(Duel):
    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        scores = super().score(model, batch)
        del scores["loss_g"]
        return scores


class Gathers(Duel):
    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        all_gather(batch[0])
        return super().score(model, batch)


class Shared(Duel):
    def optimizer(self, params: Any) -> dict[str, torch.optim.Optimizer]:  # type: ignore[override]
        return {"loss_d": torch.optim.SGD(params[:5], lr=0.1), "loss_g": torch.optim.SGD(params[4:], lr=0.1)}


class Detached(Duel):
    """The generator's loss does not depend on the generator."""

    def score(self, model: Any, batch: Any) -> dict[str, Any]:
        scores = super().score(model, batch)
        return scores | {"loss_g": scores["loss_g"].detach()}


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def fit(recipe: Recipe, run_dir: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train with hvdtrain on this world; the parameters at the end, and the summary."""
    summary = hvdtrain.fit(recipe, run_dir=run_dir, quiet=True, **options)
    return values(BUILT[-1]), summary


def mean_of(score: Any) -> Tensor:
    return score[0].sum() / score[1].sum() if isinstance(score, tuple) else score.mean()


def train_plainly(recipe: Duel, turns: Sequence[str], clip: float | None = None) -> dict[str, Tensor]:
    """Train in one process, step by step: the parameters at the end."""
    net = recipe.model()
    optimizers = recipe.optimizer(list(net.parameters()), list(net.named_parameters()))
    data = recipe.dataset("train").tensors
    steps_per_epoch = -(-EXAMPLES // BATCH)
    rates = schedule.parse_schedule(recipe.schedule, recipe.epochs * steps_per_epoch, steps_per_epoch)
    batches = [ids for epoch in range(recipe.epochs) for ids in iterate_batches(EXAMPLES, BATCH, 0, epoch)]
    turn_of = {"turn": ""}
    plain = type("Plain", (type(recipe),), {"turn": lambda self: turn_of["turn"]})(turns=recipe.turns)
    for step, ids in enumerate(batches):
        turn_of["turn"] = turns[step % len(turns)]
        scores = plain.score(net, [part[torch.from_numpy(ids)] for part in data])
        for name, optimizer in optimizers.items():
            if name not in scores:
                continue
            own = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = torch.autograd.grad(mean_of(scores[name]), own, retain_graph=True)
            for p, gradient in zip(own, gradients, strict=True):
                p.grad = gradient
        for name, optimizer in optimizers.items():
            if name in scores:
                own = [p for group in optimizer.param_groups for p in group["params"]]
                if clip is not None:
                    nn.utils.clip_grad_norm_(own, clip)
                for group in optimizer.param_groups:
                    group["lr"] = group.setdefault("own_lr", group["lr"]) * rates.factor(step)
                optimizer.step()
    return values(net)
