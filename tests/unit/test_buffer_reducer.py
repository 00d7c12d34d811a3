"""Combining buffers over ranks, with threads of this process as ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch import buffer_reducer
from hvdtrain.torch.buffer_reducer import BufferReducer
from hvdtrain.torch.buffers import resolve_buffer_modes


class Threads:
    """Stands in for `hvdtrain.comm.collectives`: each rank is a thread."""

    def __init__(self, size: int) -> None:
        self.own = threading.local()
        self.barrier = threading.Barrier(size, timeout=10)
        self.sent: dict[str, dict[int, Any]] = {}

    def rank(self, group: None = None) -> int:
        rank: int = self.own.rank
        return rank

    def gather_json(self, value: Any, name: str) -> list[Any]:
        self.sent.setdefault(name, {})[self.rank()] = value
        self.barrier.wait()
        values = [value for _, value in sorted(self.sent[name].items())]
        self.barrier.wait()
        return values

    def all_reduce_async_(self, tensor: Tensor, name: str, group: None = None) -> tuple[str, Tensor]:
        return name, tensor

    def broadcast_async_(self, tensor: Tensor, name: str, group: None = None) -> tuple[str, Tensor]:
        return f"root {name}", tensor

    def wait(self, handle: tuple[str, Tensor]) -> None:
        name, tensor = handle
        values = self.gather_json(tensor.clone(), name)
        assert len({(value.shape, value.dtype) for value in values}) == 1
        tensor.copy_(values[0] if name.startswith("root") else sum(values))


def on_ranks(size: int, function: Callable[[Threads], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    threads = Threads(size)
    monkeypatch.setattr(buffer_reducer, "collectives", threads)

    def call(rank: int) -> Any:
        threads.own.rank = rank
        return function(threads)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size)))


def step(reducer: BufferReducer, threads: Threads, share: float, forward: Callable[[], Any]) -> None:
    """One step as TorchStep makes it."""
    reducer.start_step()
    forward()
    changes = reducer.detect_changes()
    reducer.start_combining(share)
    changed = [sum(column) for column in zip(*threads.gather_json(changes, "changes"), strict=True)]
    reducer.finish_combining(changed)


def make(module: nn.Module, size: int, fixed: bool = False, **declared: str) -> BufferReducer:
    return BufferReducer("Mine", module, resolve_buffer_modes("Mine", declared, module), size, fixed)


def test_batch_norm_keeps_the_mean_of_all_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps; in the second, one of the three ranks has no examples."""
    x = torch.randn(3, 6, 4)
    shares = [[1 / 2, 1 / 3, 1 / 6], [2 / 3, 1 / 3, 0], [1 / 2, 1 / 3, 1 / 6]]

    def run(threads: Threads) -> dict[str, Tensor]:
        layer = nn.BatchNorm1d(4)
        reducer = make(layer, 3)
        for inputs, share in zip(x, shares, strict=True):
            ends = [round(6 * sum(share[: rank + 1])) for rank in range(3)]
            own = inputs[ends[threads.rank()] - round(6 * share[threads.rank()]) : ends[threads.rank()]]
            # A batch norm wants two values per channel: give it each example twice.
            step(reducer, threads, share[threads.rank()], lambda own=own: len(own) and layer(own.repeat(2, 1)))
        assert reducer.payload_bytes == 8 * 9
        return layer.state_dict()

    states = on_ranks(3, run, monkeypatch)
    expected = torch.zeros(4)
    for inputs in x:
        expected = 0.9 * expected + 0.1 * inputs.mean(0)
    for state in states:
        assert torch.equal(state["running_mean"], states[0]["running_mean"])
        torch.testing.assert_close(state["running_mean"], expected, rtol=1e-6, atol=1e-7)
        assert state["num_batches_tracked"] == 3


DTYPES = [torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("mode", ["mean", "sum", "rank0", "local"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
def test_every_type_is_combined_as_its_mode_says(
    dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of two ranks, the first of which changes nothing; each adds 2 or 4 to a value."""

    def run(threads: Threads) -> list[float]:
        module = nn.Module()
        module.register_buffer("count", torch.full((2, 3), 7).to(dtype).t())
        reducer = make(module, 2, count=mode)
        values = []
        for number in range(3):
            add = 0 if number == 0 else 2 * (threads.rank() + 1)
            step(reducer, threads, 0.5, lambda add=add: module.count.add_(add))
            assert module.count.shape == (3, 2) and len(set(module.count.reshape(-1).tolist())) == 1
            values.append(module.count[0, 0].item())
        return values

    one, other = on_ranks(2, run, monkeypatch)
    assert one == {"mean": [7, 10, 13], "sum": [7, 13, 19], "rank0": [7, 9, 11], "local": [7, 9, 11]}[mode]
    assert other == (one if mode != "local" else [7, 11, 15])


def test_sums_of_integers_are_exact_and_skipped_steps_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(threads: Threads) -> int:
        module = nn.Module()
        module.register_buffer("count", torch.tensor(2**53 + 1))
        reducer = make(module, 2, count="sum")
        step(reducer, threads, 0.5, lambda: module.count.add_(1))
        step(reducer, threads, 0.5, lambda: module.count.add_(5))
        reducer.restore_values()
        step(reducer, threads, 0.5, lambda: module.count.data.add_(2))
        return int(module.count)

    assert on_ranks(2, run, monkeypatch) == [2**53 + 7] * 2


def test_what_is_not_finite_on_a_rank_without_examples_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An observer's minimum, which is infinite until it has seen something."""

    def run(threads: Threads) -> float:
        module = nn.Module()
        module.register_buffer("minimum", torch.tensor(torch.inf))
        reducer = make(module, 2, minimum="mean")
        step(reducer, threads, 1 - threads.rank(), lambda: threads.rank() or module.minimum.fill_(3))
        return module.minimum.item()

    assert on_ranks(2, run, monkeypatch) == [3, 3]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_refuse_what_one_changes(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(threads: Threads) -> str:
        module = nn.Module()
        module.register_buffer("queue", torch.zeros(3))
        reducer = make(module, 2)
        step(reducer, threads, 0.5, lambda: None)
        with pytest.raises(UserError) as caught:
            step(reducer, threads, 0.5, lambda: threads.rank() == rank and module.queue.add_(1))
        return str(caught.value)

    assert (
        on_ranks(2, run, monkeypatch)
        == [
            "training changes the buffer 'queue' of a Module, and how its values on 2 ranks are to be combined is not "
            'known: add to Mine: buffers = {"queue": "rank0"}  # or "mean", "sum", "local"'
        ]
        * 2
    )


def test_caches_that_are_no_part_of_the_state_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(threads: Threads) -> None:
        module = nn.Module()
        module.register_buffer("cos", torch.zeros(3), persistent=False)
        reducer = make(module, 2)
        for size in (4, 5):
            step(reducer, threads, 0.5, lambda size=size: module.register_buffer("cos", torch.ones(size), False))

    on_ranks(2, run, monkeypatch)


def test_a_world_that_grows_refuses_what_one_rank_was_warned_of() -> None:
    module = nn.Module()
    module.register_buffer("queue", torch.zeros(3))
    reducer = make(module, 1)
    reducer.expect_changes(["queue"])
    assert len(reducer.take_warnings()) == 1
    reducer.expect_changes(["queue"])
    assert reducer.take_warnings() == []
    with pytest.raises(UserError, match="training changes the buffer 'queue'"):
        reducer.set_world_size(2)


def test_names_are_worth_more_than_patterns_and_shared_buffers_have_two() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    module[1].running_mean = module[0].running_mean
    assert resolve_buffer_modes("Mine", {"0.running_var": "local", "*": "rank0", "1.running_mean": "sum"}, module) == {
        "0.running_mean": "sum",
        "0.running_var": "local",
        "0.num_batches_tracked": "rank0",
        "1.running_var": "rank0",
        "1.num_batches_tracked": "rank0",
    }
