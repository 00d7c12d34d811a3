"""Recipes that change what is trained, or how, and the same training by plain torch in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import hvdtrain
from hvdtrain.recipe import schedule
from hvdtrain.torch import Recipe

STEPS = 8
BUILT: list[nn.Module] = []  # the models that recipes have made in this process


def make_data() -> TensorDataset:
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(x, x.sum(1))


@dataclass(kw_only=True)
class Base(Recipe):
    """All examples in each step, in float64: the order of examples does not matter."""

    epochs: int = STEPS
    batch_size: int = 40
    lr: float = 0.05

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        BUILT.append(self.make_model().double())
        return BUILT[-1]

    def make_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def dataset(self, split: str) -> TensorDataset:
        return make_data()

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        self.net = BUILT[-1]
        self.opt = self.make_optimizer(params)
        self.taken = 0

        def count(*_: object) -> None:
            self.taken += 1
            self.after(self.taken)

        if hasattr(self.opt, "_optimizer_step_post_hooks"):  # not one around another, which torch did not set up
            self.opt.register_step_post_hook(count)
        self.after(0)
        return self.opt

    def make_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def after(self, steps: int) -> None:
        """What is done after so many steps."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        return {"loss": (model(x)[:, 0] - y) ** 2}


class Unfrozen(Base):
    """The head first, then the body too."""

    def after(self, steps: int) -> None:
        self.net[0].requires_grad_(steps >= 3)


class InTurns(Base):
    """The body and the head, each for one step."""

    def after(self, steps: int) -> None:
        self.net[0].requires_grad_(steps % 2 == 0)
        self.net[2].requires_grad_(steps % 2 == 1)


class Gradual(Base):
    """One layer more in each step, from the last on."""

    def make_model(self) -> nn.Module:
        return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 1))

    def after(self, steps: int) -> None:
        for number, layer in enumerate(reversed(list(self.net))):
            layer.requires_grad_(number <= 2 * steps)


class BiasesOnly(Base):
    """Parts of layers: the biases first, then the weights, then the biases again."""

    def after(self, steps: int) -> None:
        for p in self.net.parameters():
            p.requires_grad_(p.dim() < 2 or 2 <= steps < 5)


class Adapter(nn.Module):
    """A layer with a low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.a.T @ self.b.T


class LoRA(Base):
    """The layer, then its adapter alone, which joins the optimizer then."""

    def make_model(self) -> nn.Module:
        return Adapter()

    def make_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.layer.parameters(), lr=self.lr)

    def after(self, steps: int) -> None:
        if steps == 3:
            self.net.layer.requires_grad_(False)
            self.opt.add_param_group({"params": [self.net.a, self.net.b], "lr": self.lr, "weight_decay": 0.1})


class Grown(Base):
    """A parameter that the model gets later."""

    def make_model(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 1))
        net.register_parameter("late", None)
        return net

    def after(self, steps: int) -> None:
        if steps == 3:
            self.net.late = nn.Parameter(torch.full((4,), 0.5, dtype=torch.float64))
            self.opt.add_param_group({"params": [self.net.late], "lr": self.lr})

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        late = 0 if model.late is None else x @ model.late
        return {"loss": (model(x)[:, 0] + late - y) ** 2}


class InScore(Base):
    """Frozen and unfrozen by `score`, between forward passes."""

    def after(self, steps: int) -> None:
        if steps == 0:
            self.net[0].requires_grad_(False)

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        if model.training and torch.is_grad_enabled():
            model[0].requires_grad_(self.taken in (1, 2, 6))
        return super().score(model, batch)


class Lion(torch.optim.Optimizer):
    """Its constructor's arguments have no defaults, and its step takes no closure."""

    def __init__(self, params: Any, lr: float, beta: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["beta"])
                    p.add_(average.sign(), alpha=-group["lr"])


class Required(Base):
    """An optimizer of the recipe's own."""

    def make_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return Lion(params, self.lr / 10, 0.9)


class Lookahead(torch.optim.Optimizer):
    """Around another, without torch's constructor (1907.08610)."""

    def __init__(self, base: torch.optim.Optimizer, k: int = 3, alpha: float = 0.5) -> None:
        self.base, self.k, self.alpha, self.n = base, k, alpha, 0
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, base.state
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.n += 1
        if self.n % self.k == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, s in zip(group["params"], slow, strict=True):
                    p.copy_(s.lerp_(p, self.alpha))


@dataclass(kw_only=True)
class Around(Base):
    """An optimizer around another, which the schedule must reach."""

    schedule: str = "linear"

    def make_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return Lookahead(torch.optim.SGD(params, lr=self.lr, momentum=0.9))


class Delegating(torch.optim.Optimizer):
    """Around another whose groups and state it shows as properties."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base

    defaults = property(lambda self: self.base.defaults)
    state = property(lambda self: self.base.state, lambda self, value: setattr(self.base, "state", value))
    param_groups = property(
        lambda self: self.base.param_groups, lambda self, value: setattr(self.base, "param_groups", value)
    )

    def step(self, closure: Any = None) -> None:
        self.base.step(closure)


class Delegated(Base):
    """An optimizer that holds nothing itself."""

    def make_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return Delegating(torch.optim.Adam(params, lr=self.lr))


class Twice(Base):
    """`params` is read twice."""

    def make_optimizer(self, params: Any) -> torch.optim.Optimizer:
        decay, plain = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        return torch.optim.SGD([{"params": decay, "weight_decay": 0.1}, {"params": plain}], lr=self.lr)


class Shared(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block, self.head, self.reentrant = nn.Linear(4, 4), nn.Linear(4, 1), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns where there is no graph, as in an evaluation
            for _ in range(3):
                x = checkpoint(self.block, x, use_reentrant=self.reentrant).tanh()
        return self.head(x)


class Reentrant(Base):
    """One block used three times, each activation-checkpointed."""

    def make_model(self) -> nn.Module:
        return Shared(reentrant=True)


class NotReentrant(Base):
    """The same, checkpointed in the way that torch recommends."""

    def make_model(self) -> nn.Module:
        return Shared(reentrant=False)


class Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.f = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128).T), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(torch.fft.irfft(torch.fft.rfft(x) * self.w.sum(0), n=4))


class Complex(Base):
    """A Fourier layer's complex weight, which is not contiguous."""

    def model(self) -> nn.Module:  # not by .double(), which would make it real
        torch.manual_seed(3)
        net = Fourier()
        net.f.double()
        BUILT.append(net)
        return net


class WithoutGraph(Base):
    """A detector: where a batch has no object there is no loss. One rank of two never has one."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        wanted = y == make_data().tensors[1].max()
        if not wanted.any():
            return {"loss": torch.zeros(len(y), dtype=y.dtype)}
        return {"loss": (model(x)[:, 0] - y) ** 2 * wanted}


class Forces(Base):
    """The loss has derivatives of the model in it, in training and in evaluation."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        x, y = batch
        x = x.clone().requires_grad_(True)
        energy = model(x)[:, 0]
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return {"loss": (energy - y) ** 2 + force.square().sum(1)}


class NanGradient(Base):
    """In step 3 the loss is finite and a gradient is not: a root at zero."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        scores = super().score(model, batch)
        if self.taken == 2 and model.training and torch.is_grad_enabled() and not getattr(self, "done", False):
            self.done = True
            scores["loss"] = scores["loss"] + (model[2].bias * 0).square().sqrt().sum()
        return scores


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def fit(make: Callable[[], Recipe], run_dir: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train with hvdtrain on this world; the parameters at the end, and the summary."""
    summary = hvdtrain.fit(make(), run_dir=run_dir, quiet=True, **options)
    return values(BUILT[-1]), summary


def train_plainly(recipe: Base, steps: int = STEPS, clip: float | None = None) -> dict[str, torch.Tensor]:
    """The same by torch alone, in this process: a step whose gradients are not finite is skipped."""
    net = recipe.model()
    optimizer = recipe.optimizer(list(net.parameters()))
    rates = schedule.parse_schedule(recipe.schedule, steps, 1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("own_lr", group["lr"]) * rates.factor(step)
        for p in net.parameters():
            p.grad = None
        recipe.score(net, make_data().tensors)["loss"].mean().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        if all(p.grad is None or p.grad.isfinite().all() for p in net.parameters()):
            optimizer.step()
    return values(net)
