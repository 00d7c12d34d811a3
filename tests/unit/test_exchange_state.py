"""The exchange's state as checkpoints hold it: the keys of hvdtrain's first format, whatever it is called now."""

from __future__ import annotations

import torch

from hvdtrain.exchange.state import SAVED_NAMES, ExchangeState


def test_a_state_is_saved_under_the_keys_of_the_first_format() -> None:
    part, tensors = torch.ones(3), [{"0.owned": torch.ones(2)}, {"0.owned": torch.zeros(2)}]
    state = ExchangeState(
        7, [["b", "a"], ["c"]], {"a.weight": part}, {"a.weight": 2 * part}, {"a.weight": (True, part)}
    )
    saved = {
        "steps": 7,
        "joined": [["b", "a"], ["c"]],
        "debts": {"a.weight.residual": part, "a.weight.velocity": 2 * part},
        "bases": {"a.weight": (True, part)},
        "ranks": [],
    }
    written = state.to_checkpoint()
    assert list(written) == list(saved)
    assert written["joined"] == saved["joined"] and written["ranks"] == []
    debts = written["debts"]
    assert isinstance(debts, dict) and list(debts) == ["a.weight.residual", "a.weight.velocity"]
    assert torch.equal(debts["a.weight.velocity"], 2 * part)
    exact = ExchangeState(7, [], rank_tensors=tensors, bucket_names=[["a.weight"]]).to_checkpoint()
    assert exact["ranks"] is tensors and exact["buckets"] == [["a.weight"]]


def test_a_saved_state_is_read_back() -> None:
    part = torch.ones(3)
    state = ExchangeState(7, [["a.weight"]], {"a.weight": part}, {"a.weight": 2 * part}, {"a.weight": 1}, [{}], [["a"]])
    again = ExchangeState.from_checkpoint(state.to_checkpoint())
    assert (again.steps, again.build_orders, again.bucket_names) == (7, [["a.weight"]], [["a"]])
    assert torch.equal(again.unsent["a.weight"], part) and torch.equal(again.velocities["a.weight"], 2 * part)
    assert again.codec_states == {"a.weight": 1} and again.rank_tensors == [{}]


def test_the_oldest_checkpoints_name_one_order_of_all_parameters() -> None:
    old = {"steps": 3, "order": ["b", "a"], "debts": {"a.residual": torch.ones(1)}, "bases": {}, "ranks": []}
    state = ExchangeState.from_checkpoint(old)
    assert state.build_orders == [["b", "a"]] and state.bucket_names is None and list(state.unsent) == ["a"]


def test_each_tensor_of_a_reducer_has_a_name_of_its_own_in_checkpoints() -> None:
    assert SAVED_NAMES == {
        "residual": "residual",
        "velocity": "velocity",
        "shard_residual": "owned",
        "carried_over": "owed",
    }
