"""What a recipe's optimizer and model may be: taken, warned of or refused in one line, on one rank and on several."""

import os
import random
import signal
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.system.errors import UserError
from hvdtrain.torch.setup import make_optimizers
from tests.ranks.changing_recipes import BUILT, Base, fit, train_plainly
from tests.ranks.test_changing_recipes import check_same
from tests.support.worlds import on_ranks


class Tuple(Base):
    def optimizer(self, params):
        return torch.optim.SGD(params[:2], lr=self.lr), torch.optim.Adam(params[2:])


@dataclass(kw_only=True)
class Outside(Base):
    def __post_init__(self):
        self.log_var = nn.Parameter(torch.zeros(()))

    def make_optimizer(self, params):
        return torch.optim.SGD([*params, self.log_var], lr=self.lr)


@dataclass(kw_only=True)
class OutsideModule(Base):
    def __post_init__(self):
        self.arcs = nn.Linear(2, 3)

    def make_optimizer(self, params):
        return torch.optim.SGD([*params, *self.arcs.parameters()], lr=self.lr)


class AllFrozen(Base):
    def make_model(self):
        return super().make_model().requires_grad_(False)


class Closure(Base):
    def optimizer(self, params):
        return torch.optim.LBFGS(params, lr=self.lr)


class Sam(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"


class AssertedClosure(Base):
    def make_optimizer(self, params):
        return Sam(params, lr=self.lr)


class Float8(Base):
    def make_model(self):
        net = super().make_model()
        net.scale = nn.Parameter(torch.ones(2).to(torch.float8_e4m3fn))
        return net

    def model(self):
        torch.manual_seed(3)
        BUILT.append(self.make_model())
        return BUILT[-1]


class Detached(Base):
    def score(self, model, batch):
        return {name: value.detach() for name, value in super().score(model, batch).items()}


class AlwaysZero(Base):
    def score(self, model, batch):
        return {"loss": torch.zeros(len(batch[1]))}


class ExtraState(Base):
    def make_model(self):
        class Net(nn.Sequential):
            def get_extra_state(self):
                return {"history": np.zeros(3)}

            def set_extra_state(self, state):
                pass

        return Net(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = np.zeros(2)


class OwnState(Base):
    def make_optimizer(self, params):
        return Counting(params, lr=self.lr)


class SetInGroup(Base):
    def make_optimizer(self, params):
        return torch.optim.SGD([{"params": params, "kind": signal.SIGTERM}], lr=self.lr)


OUTSIDE = (
    "is not a parameter of the model, so it would be neither saved nor sent to other ranks: put it into the model in "
)
OUTSIDE += "model(), and take it from there"
NO_GRAPH = "'loss' depends on no parameter that is trained, on no rank: compute it from the model's outputs, without "
NO_GRAPH += "detach(), item() or no_grad(), and with parameters that require a gradient"
UNREADABLE = (
    "with which a checkpoint could not be read back: make it a tensor, a number, a text, or lists and dicts of them"
)
REFUSED = {
    Tuple: "Tuple.optimizer() returned tuple; expected a torch.optim.Optimizer, or a dict of them by the names of "
    "their losses, e.g. {'loss_d': ..., 'loss_g': ...}",
    Outside: f"Outside.optimizer: self.log_var, of shape (), {OUTSIDE}",
    OutsideModule: f"OutsideModule.optimizer: self.arcs.weight, of shape (3, 2), {OUTSIDE}",
    AllFrozen: "AllFrozen.optimizer: none of the optimizer's 4 parameters requires a gradient: there is nothing to "
    "train; use requires_grad_(True) for those that are to be trained",
    Closure: "Closure.optimizer: LBFGS needs a closure: it cannot be used",
    AssertedClosure: "AssertedClosure.optimizer: Sam needs a closure: it cannot be used",
    Float8: "parameter scale is torch.float8_e4m3fn, whose gradient cannot be exchanged; expected float16, bfloat16, "
    "float32, float64, complex64 or complex128: convert it, or freeze it with requires_grad_(False)",
    Detached: f"Detached.score: {NO_GRAPH}",
    AlwaysZero: f"AlwaysZero.score: {NO_GRAPH}",
    ExtraState: f"the model's state['_extra_state']['history'] is a numpy.ndarray, {UNREADABLE}",
    OwnState: f"the optimizer's state['state'][0]['seen'] is a numpy.ndarray, {UNREADABLE}",
    SetInGroup: f"the optimizer's state['param_groups'][0]['kind'] is a signal.Signals, {UNREADABLE}",
}


@on_ranks(1, 2)
@pytest.mark.parametrize("name", [cls.__name__ for cls in REFUSED])
def test_untrainable_recipes_are_refused_in_one_line(name, tmp_path):
    cls = globals()[name]
    with pytest.raises(UserError) as raised:
        fit(cls, tmp_path / "run")
    assert str(raised.value) == REFUSED[cls]
    if BUILT:
        assert all(not p._post_accumulate_grad_hooks for p in BUILT[-1].parameters()), "its hooks are left behind"


class LeftOut(Base):
    def make_optimizer(self, params):
        return torch.optim.SGD([{"params": params[2:]}, {"params": []}], lr=self.lr)


def train_left_out(folder):
    hvdtrain.fit(LeftOut(), run_dir=folder / "run")


def test_what_is_in_no_group_is_reported(world2, tmp_path):
    world2.run(train_left_out, tmp_path)
    lines = world2.printed[0].splitlines()
    assert lines.count("warning   in no group of the optimizer, so not trained: 0.weight, 0.bias") == 1
    assert lines.count("warning   without parameters: the optimizer's group 1") == 1


@dataclass(kw_only=True)
class Named(Base):
    """Parameters and groups in the one order or the other; numpy's numbers in a group."""

    backwards: bool = False

    def make_model(self):
        net = nn.ModuleDict()
        for name in "cba" if self.backwards else "abc":
            net[name] = nn.Linear(4, 1)
        for number, name in enumerate("abc"):
            nn.init.constant_(net[name].weight, number + 1.0)
            nn.init.constant_(net[name].bias, -number - 1.0)
        return net

    def make_optimizer(self, params):
        weights = [p for p in params if p.ndim > 1]
        biases = [p for p in params if p.ndim == 1]
        groups = [{"params": weights, "weight_decay": np.sqrt(1e-2)}, {"params": biases, "lr": np.float64(0.01)}]
        return torch.optim.AdamW(groups[::-1] if self.backwards else groups, lr=self.lr, betas=(np.float64(0.8), 0.95))

    def score(self, model, batch):
        x, y = batch
        return {"loss": sum((model[name](x)[:, 0] - i * y) ** 2 for i, name in enumerate("abc"))}


@dataclass(kw_only=True)
class Moved(Named):
    """Another parameter in a group than before."""

    moved: bool = False

    def make_optimizer(self, params):
        if not self.moved:
            return super().make_optimizer(params)
        return torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=self.lr)


@on_ranks(1, 2)
def test_state_is_matched_by_name(tmp_path):
    """Resumed with parameters and groups in another order: as if nothing had changed."""
    fit(lambda: Named(epochs=4, schedule="constant"), tmp_path / "run")
    found, _ = fit(lambda: Named(epochs=8, backwards=True, schedule="constant"), tmp_path / "run", resume=True)
    expected = train_plainly(Named(), steps=8)
    check_same({name: found[name] for name in expected}, expected)

    fit(lambda: Moved(epochs=2), tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"parameter \w.\w+ is in another group of the optimizer than in the checkpoint"
    ):
        fit(lambda: Moved(epochs=4, moved=True), tmp_path / "moved", resume=True)


def settings():
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "threads": torch.get_num_threads(),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": torch.get_float32_matmul_precision(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "torch": torch.get_rng_state().tolist(),
    }


class Setting(Base):
    def make_model(self):
        torch.set_float32_matmul_precision("medium")
        return super().make_model()


class Failing(Setting):
    def score(self, model, batch):
        raise ValueError("out of luck")


@on_ranks(1, 2)
def test_fit_puts_back_what_it_sets(tmp_path):
    torch.set_num_threads(2)
    before = settings()
    fit(Setting, tmp_path / "run", deterministic=True)
    assert settings() == before
    with pytest.raises(Exception, match="out of luck"):
        fit(Failing, tmp_path / "fails", deterministic=True)
    assert settings() == before
    with pytest.raises(UserError):
        fit(AllFrozen, tmp_path / "refused", deterministic=True)
    assert settings() == before


class GivenNames(Base):
    """No weight decay for biases, by their names."""

    def optimizer(self, params, named):
        assert [p for _, p in named] == list(params) and isinstance(params, list)
        decayed = {True: [p for name, p in named if name.endswith("weight")]}
        decayed[False] = [p for name, p in named if name.endswith("bias")]
        return super().optimizer([{"params": decayed[own], "weight_decay": 0.1 * own} for own in (True, False)])


class GivenKeyword(Base):
    """`named` by keyword, after an option of its own with a default."""

    def optimizer(self, params, momentum=0.5, *, named):
        return super().optimizer([p for name, p in named if name.startswith("2")])

    def make_optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr, momentum=0.5)


@on_ranks(1, 2)
def test_an_optimizer_is_given_names_if_it_declares_them(tmp_path):
    for cls in (GivenNames, GivenKeyword):
        found, _ = fit(cls, tmp_path / cls.__name__)
        net, recipe = cls().model(), cls()
        optimizer = make_optimizers(recipe, net)[0]["loss"]
        for _ in range(8):
            optimizer.zero_grad()
            recipe.score(net, recipe.dataset("train").tensors)["loss"].mean().backward()
            optimizer.step()
        check_same(found, {name: p.detach() for name, p in net.named_parameters()})
