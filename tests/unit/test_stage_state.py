"""States of models in stages: what is divided is joined to the same, and where a model may be cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdtrain.exchange.pipeline_options import PipelineOptions
from hvdtrain.system.errors import UserError
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.groups import get_parameter_names
from hvdtrain.torch.model_chain import find_chain, run_chain
from hvdtrain.torch.stage_cut import cut_evenly
from hvdtrain.torch.stage_state import WholeModel, join_stage_states, split_state
from hvdtrain.torch.stages import find_shared_parameters, keep_modules, keep_parameters
from hvdtrain.training.options import make_run_options
from tests.ranks.test_several_optimizers import assert_same_state


class Tied(nn.Module):
    """The first layer is the last one too; a buffer, and a module that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.middle = nn.Embedding(5, 4), nn.ModuleList([nn.LayerNorm(4), nn.Linear(4, 4)])
        self.back = nn.Linear(4, 5, bias=False)
        self.back.weight = self.front.weight
        self.middle[1].register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.front(x)
        for module in self.middle:
            x = module(x)
        return self.back(x)


def make_parts(model: nn.Module, optimizer: Any, average: nn.Module) -> list[tuple[nn.Module, Any, nn.Module]]:
    """The model in two stages, each with its optimizer and its average."""
    parts = []
    for names in (["front", "middle.0"], ["middle.1", "back"]):
        own, own_optimizer, own_average = copy.deepcopy((model, optimizer, average))
        keep_modules(own, names)
        keep_modules(own_average.module, names)
        keep_parameters(own_optimizer, own)
        parts.append((own, own_optimizer, own_average))
    return parts


def make_state(model: nn.Module, optimizer: Any, average: nn.Module) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameters": get_parameter_names(optimizer, model),
        "settings": [],
        "ema": average.state_dict(),
    }


def test_a_state_is_divided_and_joined_to_the_same() -> None:
    model = Tied()
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == kind] for kind in (True, False))
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": matrices}], lr=0.1)
    average = AveragedModel(model, 0.9)
    model(torch.tensor([[1, 2]])).square().sum().backward()
    optimizer.step()
    average.update_parameters(model)
    whole, state = WholeModel.of(model, optimizer), make_state(model, optimizer, average)
    names = [name for group in whole.groups for name in group]
    state["exchange"] = {
        "steps": 3,
        "joined": [["middle.1.weight", "front.weight"], ["middle.0.bias"]],
        "debts": {f"{name}.residual": torch.randn(4) for name in names},
        "bases": {"front.weight": torch.randn(2)},
        "ranks": [],
    }
    divided = []
    for own, own_optimizer, own_average in make_parts(model, optimizer, average):
        part = split_state(state, whole, own)
        own.load_state_dict(part["model"])
        own_average.load_state_dict(part["ema"])
        own_optimizer.load_state_dict(part["optimizer"])
        assert part["parameters"] == get_parameter_names(own_optimizer, own)
        assert part["optimizer"]["param_groups"][0]["weight_decay"] == 0.0
        divided.append({**make_state(own, own_optimizer, own_average), "exchange": part["exchange"]})
    joined = join_stage_states(divided, whole)
    state["exchange"]["joined"] = joined["exchange"]["joined"]  # the stages' one after the other
    assert sorted(joined["exchange"]["joined"][0]) == ["front.weight", "middle.1.weight"]
    joined["exchange"]["debts"] = {name: joined["exchange"]["debts"][name] for name in state["exchange"]["debts"]}
    assert_same_state(joined, state)
    assert list(joined["model"]) == list(state["model"])


def test_a_state_of_another_model_is_refused() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole, state = WholeModel.of(model, optimizer), make_state(model, optimizer, nn.Module())
    state["model"] = {**state["model"], "more": torch.zeros(2)}
    with pytest.raises(UserError, match="it has 'more' \\(2,\\) float32, which this run has not"):
        split_state(state, whole, model)


def test_a_chain_is_found_through_loops_and_does_what_the_model_does() -> None:
    model = Tied()
    x = torch.tensor([[1, 2], [3, 4]])
    chain = find_chain(model, lambda: model(x), "the model")
    assert [link.name for link in chain] == ["front", "middle.0", "middle.1", "back"]
    assert torch.equal(run_chain(chain, model, (x,)), model(x))
    assert find_shared_parameters(model, [["front"], ["middle.0", "middle.1"], ["back"]]) == {"front.weight": [0, 2]}


class Scaled(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Written(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.middle[1](self.front(x).mul_(2)))


class Used(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.zeros(()))


class Repeated(Tied):
    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.middle[1](self.middle[1](self.middle[0](self.front(x)))))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Scaled, "cannot be cut: Scaled does not return what 'back' returns"),
        (Written, "cannot be cut: what 'front' returns is changed before 'middle.1'"),
        (Used, "cannot be cut: Used has 'own', which is in none of the modules that it calls"),
        (Repeated, "calls 'middle.1' twice in a pass"),
    ],
)
def test_a_model_that_is_no_chain_is_refused_with_what_it_does(kind: type[nn.Module], text: str) -> None:
    model = kind()
    with pytest.raises(UserError) as caught:
        find_chain(model, lambda: model(torch.tensor([[1, 2]])), "the model")
    assert text in str(caught.value)


def test_stages_take_about_as_long() -> None:
    assert cut_evenly([3, 1, 1, 1, 3], 3).ends == (1, 4, 5)
    assert cut_evenly([1, 1, 1, 9], 2).ends == (3, 4)
    assert cut_evenly([5, 0, 0, 0], 4).list_bounds() == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_micro_batches_are_chosen_for_the_stages() -> None:
    options = PipelineOptions(stages=4, schedule="interleaved")
    assert options.choose_micro_batch(None, 64) == 8
    assert (options.count_micro_batches(40, 8), PipelineOptions(stages=4).count_micro_batches(40, 8)) == (8, 5)
    assert options.name_places() == [f"stages {i} and {i + 4}" for i in range(4)]
    with pytest.raises(
        UserError, match=r"--stages 4 needs 4 micro-batches a step at least.*give --micro-batch 2 at most"
    ):
        options.choose_micro_batch(4, 11)


@pytest.mark.parametrize(
    "more",
    [
        {"deterministic": True},
        {"exchange": "horovod"},
        {"shard": "optimizer"},
        {"shard": "model"},
        {"tensor": 2},
        {"checkpoint_residuals": "exact"},
        {"local_steps": 4},
        {"prune": "0.5,from:1ep,to:2ep"},
        {"amp": "fp16"},
        {"compile": True},
        {"sync_batchnorm": True},
        {"recompute": "all", "pipeline_schedule": "zerobubble"},
        {"compression": "auto"},
        {"shares": "measured"},
        {"batch_per_rank": 4},
        {"init_from": "weights.pt"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_options_that_are_not_exact_with_stages_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--stages 2 with --"):
        make_run_options({"stages": 2, **more})
