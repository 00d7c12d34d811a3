"""What watches a model and puts it back, without ranks: tensors of any layout, trials, modes, uneven steps."""

from __future__ import annotations

import copy
import random
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvdtrain.exchange.checksums import checksum_tensor
from hvdtrain.recipe import order, schedule
from hvdtrain.recipe.shares import Shares, even_shares, make_shares
from hvdtrain.system.errors import UserError
from hvdtrain.torch import Recipe
from hvdtrain.torch.modes import TrainingModes
from hvdtrain.torch.sandbox import open_sandbox
from hvdtrain.torch.tensors import (
    fingerprint_tensors,
    has_same_bits,
    is_writable_in_place,
    load_module_state,
    overwrite_tensor,
)
from hvdtrain.torch.watch import LearningRateWatch, ParameterReport, find_divergent_parameter
from hvdtrain.training.plan import TrainingPlan
from hvdtrain.training.position import Position
from hvdtrain.training.ragged import refuse_uneven_calls

SEEN: list[int] = []


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, about sparse and quantized tensors
        return {
            "coo": torch.eye(4).to_sparse(),
            "csr": torch.eye(4).to_sparse_csr(),
            "csc": torch.eye(4).to_sparse_csc(),
            "expanded": torch.ones(1).expand(4),
            "rows": torch.arange(4).expand(8, -1),
            "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            "channels": torch.quantize_per_channel(
                torch.ones(2, 3), torch.tensor([0.1, 0.2]), torch.zeros(2), 0, torch.qint8
            ),
        }


def plain_tensors() -> dict[str, torch.Tensor]:
    return {
        "nan": torch.tensor([torch.nan, 1.0]),
        "bool": torch.tensor([True, False]),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.polar(torch.ones(2), torch.arange(2.0)),
        "complex128": torch.ones(2, dtype=torch.complex128),
        "conjugated": torch.polar(torch.ones(2), torch.arange(2.0)).conj(),
        "transposed": torch.arange(6).view(2, 3).t(),
        "scalar": torch.tensor(2**60 + 1),
        "empty": torch.zeros(0, 3),
    }


KINDS = [*odd_tensors(), *plain_tensors()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_any_layout_are_compared_copied_and_overwritten(kind: str) -> None:
    tensor, same = ({**odd_tensors(), **plain_tensors()}[kind] for _ in range(2))
    assert is_writable_in_place(tensor) == (kind in plain_tensors())
    assert has_same_bits(tensor, same)
    assert int(checksum_tensor(tensor)) == int(checksum_tensor(same))
    if tensor.numel() == 0:
        return
    model = nn.Module()
    model.register_buffer("one", tensor)
    model.register_buffer("tied", tensor)
    overwrite_tensor(model, tensor, same)
    assert model.one is tensor
    other = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8) if kind == "quantized" else None
    if other is None:
        if kind == "channels":
            return
        other = ~tensor if tensor.dtype == torch.bool else tensor * 2
    assert not has_same_bits(tensor, other)
    assert int(checksum_tensor(tensor)) != int(checksum_tensor(other))
    overwrite_tensor(model, tensor, other)
    assert has_same_bits(model.one, other)
    assert model.tied is model.one
    assert (model.one is tensor) == is_writable_in_place(tensor)


@pytest.mark.filterwarnings("ignore")
def test_a_state_is_loaded_into_tensors_that_may_not_be_written() -> None:
    def make() -> nn.Module:
        model = nn.Linear(2, 1)
        for name, tensor in {**odd_tensors(), **plain_tensors()}.items():
            model.register_buffer(name, tensor)
        return model

    model, state = make(), make().state_dict()
    state["expanded"] = torch.full((1,), 5.0).expand(4)
    load_module_state(model, state)
    for name, value in model.state_dict().items():
        assert has_same_bits(value, state[name]), name
    with pytest.raises(RuntimeError, match="size mismatch for expanded"):
        load_module_state(model, {**state, "expanded": torch.ones(1).expand(5)})
    with pytest.raises(RuntimeError, match="other is in the checkpoint only"):
        load_module_state(model, {**state, "other": torch.ones(1)})
    del state["nan"]
    with pytest.raises(RuntimeError, match="nan is in the model only"):
        load_module_state(model, state)


def test_fingerprints_change_with_any_kind_of_value() -> None:
    for name, tensor in plain_tensors().items():
        before = fingerprint_tensors([(name, tensor)])
        if name in before:
            changed = ~tensor if tensor.dtype == torch.bool else tensor + 1
            if tensor.dtype == torch.bool:
                changed = torch.ones_like(tensor)
            assert name == "nan" or not torch.equal(before[name], fingerprint_tensors([(name, changed)])[name]), name


@dataclass(kw_only=True)
class Observing(Recipe):
    """Counts its calls wherever it can."""

    calls: ClassVar[int] = 0
    counts: ClassVar[dict[str, int]] = {"calls": 0}

    def __post_init__(self) -> None:
        self.own: list[int] = []

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def dataset(self, split: Any) -> Any:
        return None

    def optimizer(self, params: Any) -> Any:
        return None

    def score(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        SEEN.append(1)
        Observing.calls += 1
        Observing.counts["calls"] += 1
        Observing.new = 1
        self.own.append(1)
        model.calls = 1
        model[0].eval()
        model[0].weight.data.mul_(2)
        model.register_buffer("late", torch.ones(1))
        model.register_forward_hook(lambda *_: None)
        torch.rand(1), np.random.rand(), random.random()
        out: torch.Tensor = model(batch)
        out.sum().backward()
        return {"loss": out[:, 0]}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_leaves_nothing_behind(in_place: bool, fails: bool) -> None:
    recipe = Observing()
    model = recipe.model()
    before, names = copy.deepcopy(model.state_dict()), set(vars(model))
    draws = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    try:
        with open_sandbox(recipe, model, [], in_place) as trial:
            assert (trial.model is model) == (trial.recipe is recipe) == in_place
            trial.recipe.score(trial.model, torch.randn(4, 2))
            assert len(SEEN) == 1
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert (SEEN, Observing.calls, Observing.counts, recipe.own) == ([], 0, {"calls": 0}, [])
    assert not hasattr(Observing, "new")
    assert set(vars(model)) == names
    assert not model._forward_hooks
    assert model.state_dict().keys() == before.keys()
    assert all(has_same_bits(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert np.random.get_state()[1].tolist() == draws[1]
    assert random.getstate() == draws[2]


def test_copies_share_datasets_and_keep_what_belongs_together() -> None:
    recipe = Observing()
    recipe.net = recipe.model()
    recipe.data = data = torch.utils.data.TensorDataset(torch.ones(3))
    recipe.x = data.tensors[0]
    with open_sandbox(recipe, recipe.net, [data]) as trial:
        assert trial.copy_error is None
        assert trial.recipe.net is trial.model is not recipe.net
        assert trial.recipe.data is data and trial.recipe.x is data.tensors[0]


def test_a_dataset_that_refers_to_the_recipe_does_not_keep_it_from_being_copied() -> None:
    recipe = Observing()
    recipe.data = data = torch.utils.data.TensorDataset(torch.ones(3))
    data.recipe, data.nets = recipe, [model := recipe.model()]
    with open_sandbox(recipe, model, [data]) as trial:
        assert trial.copy_error is None
        assert trial.recipe is not recipe and trial.model is not model
        assert trial.recipe.data is data


def test_a_hook_that_reaches_past_the_copy_is_undone_or_refused() -> None:
    recipe = Observing()
    model = recipe.model()
    with open_sandbox(recipe, model, []):
        model[1].running_mean.add_(1)
    assert torch.equal(model[1].running_mean, torch.zeros(2))
    refused = pytest.raises(UserError, match=r"score changes the parameter '0.bias' past the model that it is given")
    with refused, open_sandbox(recipe, model, []), torch.no_grad():
        model[0].bias.add_(1)


def test_weights_that_are_computed_anew_do_not_keep_a_model_from_being_copied() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.utils.weight_norm(nn.Linear(2, 2))
    with open_sandbox(Observing(), model, []) as trial:
        assert trial.copy_error is None
        trial.model(torch.ones(1, 2)).sum().backward()


class Merges(nn.Linear):
    """Does more than set its mode, as LoRA's layers do."""

    merged = False

    def train(self, mode: bool = True) -> Merges:
        self.merged = not mode
        return super().train(mode)


def test_modes_come_back_after_an_evaluation() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Sequential(nn.Dropout(), Merges(2, 2)), Merges(2, 2).eval())
    modes = TrainingModes(model)
    expected = [True, False, True, True, True, False]
    assert [module.training for module in model.modules()] == expected
    for _ in range(2):
        modes.enter_evaluation()
        modes.enter_evaluation()
        assert not any(module.training for module in model.modules())
        assert model[1][1].merged
        assert modes.leave_evaluation()
        assert [module.training for module in model.modules()] == expected
        assert (model[1][1].merged, model[2].merged) == (False, True)
    assert not modes.leave_evaluation()
    model[0].train()  # by the recipe
    modes.enter_evaluation()
    modes.leave_evaluation()
    assert model[0].training
    assert TrainingModes(nn.Linear(1, 1).eval()).started_in_eval


def test_reports_of_ranks_are_compared() -> None:
    same = ParameterReport(1, {"a": 1, "b": 2})
    assert find_divergent_parameter([same, same]) is None
    assert find_divergent_parameter([same, ParameterReport(0, {})]) is None  # it has no examples
    assert find_divergent_parameter([same, ParameterReport(1, {"a": 1, "b": 3})]) == "b"
    assert find_divergent_parameter([same, ParameterReport(2, {"b": 2})]) == "a"


def test_learning_rates_of_somebody_else_are_noticed() -> None:
    groups: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": torch.tensor(0.2)}]
    rates = LearningRateWatch("Mine")
    assert not rates.has_changed(groups)
    rates.set_baseline(groups)
    assert not rates.has_changed(groups)
    groups[1]["lr"] = torch.tensor(0.3)
    assert rates.has_changed(groups)


def plan(
    examples: int, batch: int, ranks: int, micro: int, shards: int, steps: int, shares: Shares = ()
) -> TrainingPlan:
    return TrainingPlan(
        ranks=ranks,
        shares=shares or even_shares(ranks),
        examples=examples,
        batch_size=batch,
        shards=shards,
        micro_batch=micro,
        eval_micro_batch=micro,
        deterministic=shards != ranks,
        max_passes=0,
        steps_per_epoch=-(-examples // batch),
        total_steps=steps,
        epochs=1,
        ends_with_epoch=False,
        lr=0.1,
        lr_scale=1.0,
        schedule=schedule.parse_schedule("constant", steps, 1),
    )


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(0, 39),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_uneven_steps_are_found(
    examples: int, batch: int, ranks: int, micro: int, factor: int, steps: int, offset: int, weights: list[int]
) -> None:
    """Against the steps as the loop makes them."""
    shares = make_shares(weights[:ranks])
    made = plan(examples, batch, ranks, micro, ranks * factor, steps, shares)
    at = Position(examples=examples, seed=0, offset=offset % examples)
    uneven, left, start = False, steps, at.offset
    while left and not uneven:
        for first in range(start, examples, batch):
            if not left:
                break
            left -= 1
            count = min(batch, examples - first)
            passes = []
            for rank in range(ranks):
                own = range(*order.share_bounds(made.shards, rank, shares))
                bounds = [order.part_bounds(count, shard, made.shards) for shard in own]
                if factor == 1:
                    bounds = [order.share_bounds(count, rank, shares)]
                passes.append(sum(len(order.split_micro_batches(np.arange(a, b), micro)) for a, b in bounds))
            assert made.count_passes(count) == passes
            uneven |= len(set(passes)) > 1
        start = 0
    parts = [order.part_bounds(ranks * 7, rank, ranks) for rank in range(ranks)]
    assert len({b - a for a, b in parts}) == 1  # an evaluation that is even
    if uneven:
        with pytest.raises(UserError, match="calls collectives, so all ranks must call it equally"):
            refuse_uneven_calls("Mine", made, {"eval": ranks * 7}, at)
    else:
        refuse_uneven_calls("Mine", made, {"eval": ranks * 7}, at)


def test_uneven_evaluations_are_refused() -> None:
    with pytest.raises(UserError, match="in an evaluation of 5 examples rank 0 calls it 3 times and rank 1 2 times"):
        refuse_uneven_calls("Mine", plan(8, 8, 2, 1, 2, 1), {"eval": 5}, Position(examples=8, seed=0))
