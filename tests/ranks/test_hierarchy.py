"""--hierarchy host: each host adds up its ranks' gradients and encodes the sum once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hvdtrain
from hvdtrain.comm import collectives, host_groups
from hvdtrain.comm.host_groups import HostGroups, connect_hosts
from hvdtrain.compression.codec import Codec, RandomKey
from hvdtrain.compression.hierarchical_reducer import HierarchicalReducer, RoundOrder
from hvdtrain.compression.reducer import ReducerOptions
from hvdtrain.compression.spec import make_codec, parse_compression
from hvdtrain.exchange.state import ExchangeState, gather_exchange_state, load_exchange_state
from hvdtrain.torch import DistributedOptimizer
from tests.ranks.channels import at_once, channel, exchange, gradient, summed
from tests.ranks.elastic import ElasticJob, verify
from tests.support.worlds import KeptWorld, KeptWorlds, on_ranks, train_here

SPECS = ["bf16", "fp16", "int8", "onebit", "qsgd:4bit"]
ROWS = [[0, 2], [1, 3]]  # ranks by host: not one after the other
SHAPES = [(40, 70), (7, 30), (1, 13)]  # 3,023 values: in the last part padding
N = sum(n * m for n, m in SHAPES)
CPU = torch.device("cpu")
numbers = itertools.count(1)
DIGITS = ("digits", "--epochs", "2", "--log-every", "1", "--width", "8", "--diagnose")
PAIRED = f"{Path(__file__).with_name('hierarchy_recipes.py')}:Paired"
HIERARCHY = ("--compression", "int8,min=64,warmup=0", "--hierarchy", "host")


@contextmanager
def hosts(rows: Sequence[Sequence[int]]) -> Iterator[None]:
    """As if these ranks shared hosts."""
    with mock.patch.object(host_groups, "arrange_rows", lambda _: rows):
        yield


@contextmanager
def groups(rows: Sequence[Sequence[int]] = ROWS) -> Iterator[HostGroups]:
    with hosts(rows):
        found = connect_hosts(hvdtrain.init(), f"tests.{next(numbers)}", CPU)
    assert isinstance(found, HostGroups)
    try:
        yield found
    finally:
        collectives.barrier("tests.groups")
        found.close()


def make_parts(text: str, number: int) -> tuple[Codec, ReducerOptions]:
    spec = parse_compression(at_once(text))
    codec = make_codec(spec, spec.argument, SHAPES, RandomKey(0, 0, number, 0), CPU, scatters=True)
    return codec, ReducerOptions(feedback=spec.feedback, warmup=spec.warmup)


def make_reducer(text: str, order: RoundOrder, number: int) -> HierarchicalReducer:
    codec, options = make_parts(text, number)
    key = RandomKey(0, 0, number, collectives.rank())
    return HierarchicalReducer(f"tests.{number}", torch.zeros(N), codec, key, options, order)


class PlainLoop:
    """The same in one process: the gradients of all ranks in, their sum out."""

    def __init__(self, text: str, number: int) -> None:
        self.codec, options = make_parts(text, number)
        self.feedback = self.codec.feedback if options.feedback is None else options.feedback
        self.number, block = number, self.codec.block_size
        self.part = -(-N // (4 * block)) * block
        self.residuals = torch.zeros(2, N, dtype=torch.float64)  # of each host
        self.sum_residuals = torch.zeros(2, 2, self.part)  # by shard and part

    def pad(self, x: Tensor) -> Tensor:
        """As shards of parts: the last block is filled with its own values, the rest with zeros."""
        block = self.codec.block_size
        count = N % block
        again = x[N - count :].repeat(block)[count:block] if count else x[:0]
        return torch.cat([x, again, x.new_zeros(4 * self.part - N - len(again))]).view(2, 2, self.part)

    def add_up(self, step: int, gradients: Sequence[Tensor]) -> Tensor:
        key = RandomKey(0, step, self.number, 0)
        total = torch.zeros(2, 2, self.part)
        for host, row in enumerate(ROWS):
            wanted = (sum(gradients[rank].double() for rank in row) + self.residuals[host]).float()
            sent = torch.zeros(2, 2, self.part)
            for place, rank in enumerate(row):
                shard, own = self.pad(wanted)[place], replace(key, rank=rank)
                sent[place] = self.codec.decode(self.codec.encode(shard, own), self.part, own)
            if self.feedback:
                self.residuals[host] = (wanted - sent.flatten()[:N]).double()
            total += sent
        total += self.sum_residuals
        decoded = torch.zeros(2, 2, self.part)
        for place, host in itertools.product(range(2), range(2)):
            own = replace(key, rank=ROWS[host][place], round=1)
            payload = self.codec.encode(total[place, host][None], own)
            decoded[place, host] = self.codec.decode(payload, self.part, own)[0]
        if self.feedback:
            self.sum_residuals = total - decoded
        return decoded.flatten()[:N]


def all_gradients(step: int) -> list[Tensor]:
    own = gradient(step, N).numpy()
    return [torch.from_numpy(x) for x in collectives.gather_array(own, f"tests.gradients.{step}")]


@on_ranks(4, timeout=120)
def test_it_sends_what_a_plain_loop_over_host_sums_sends() -> None:
    with groups() as found:
        assert found.describe() == "2 hosts x 2 ranks"
        for text in SPECS:
            number, order = next(numbers), RoundOrder(found)
            reducer, loop = make_reducer(text, order, number), PlainLoop(text, number)
            order.set_reducers([reducer])
            for step in range(6):
                expected = loop.add_up(step, all_gradients(step))
                applied = exchange(reducer, step, gradient(step, N))
                # What is rounded to the next level is off by one level where the sums differ in their last bit.
                close = torch.isclose(applied, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
                assert close.float().mean() > (0.99 if step else 0.998), (text, step, close.float().mean())
            if text in ("bf16", "fp16"):
                assert reducer.residual is None


@on_ranks(4, timeout=120)
def test_what_is_applied_and_what_is_left_are_the_gradients() -> None:
    """Each step: gradients and what was left before = what was applied and what is left after, in float64."""
    with groups() as found:
        for text in ("int8", "onebit", "qsgd:2bit,feedback=on", "bf16,feedback=on"):
            order = RoundOrder(found)
            reducer = make_reducer(text, order, next(numbers))
            order.set_reducers([reducer])
            for step in range(10):
                g, before = gradient(step, N), summed(reducer.total_unsent())
                if step == 5:  # as after a resume on another number of ranks
                    reducer.carried_over = torch.full((N,), 0.25)
                    before = before + 1.0
                exact = summed(g) + before
                applied = exchange(reducer, step, g).double().numpy()
                after = summed(reducer.total_unsent())
                scale = np.abs(exact).max() + np.abs(after).max()
                assert np.abs(exact - applied - after).max() / scale < 2e-6, (text, step)
                everyone = collectives.gather_json(reducer.flat.tolist(), "tests.same")
                assert all(values == everyone[0] for values in everyone)


@on_ranks(4)
def test_the_sum_is_within_the_codecs_error_of_the_flat_one() -> None:
    """int8 rounds each value to 127 levels of its block's largest, once for a host or a rank, and once for the sum."""
    with groups() as found:
        order = RoundOrder(found)
        reducer, flat = make_reducer("int8", order, next(numbers)), channel("int8", SHAPES)
        order.set_reducers([reducer])
        for step in range(5):
            everyone = all_gradients(100)
            exact = torch.stack(everyone).double().sum(0)
            bound = 6 * max(float(g.abs().max()) for g in (*everyone, exact.float())) / 254
            steps = [exchange(one, step, gradient(100, N)).double() for one in (reducer, flat)]
            for applied in steps:
                assert (applied - exact).abs().max() <= 2 * bound
        sent = [one.wire_bytes for one in (reducer, flat)]
        assert sent[0] < 0.4 * sent[1]  # a third, but for padding: of 4 ranks, three receive a part in each round


@on_ranks(4)
def test_a_warm_up_is_plain_and_infinity_is_seen() -> None:
    with groups() as found:
        order = RoundOrder(found)
        reducer = make_reducer("int8,warmup=2", order, next(numbers))
        order.set_reducers([reducer])
        for step in range(2):
            torch.testing.assert_close(
                exchange(reducer, step, gradient(step, N)),
                torch.stack(all_gradients(step)).sum(0),
                rtol=1e-5,
                atol=1e-5,
            )
        exchange(reducer, 2, gradient(2, N))
        left = summed(reducer.total_unsent())
        spoiled = gradient(3, N)
        if collectives.rank() == 1:
            spoiled[5] = float("inf")
        exchange(reducer, 3, spoiled)
        assert not reducer.sum_is_finite()
        assert np.array_equal(summed(reducer.total_unsent()), left)
        assert torch.isfinite(exchange(reducer, 4, gradient(4, N))).all()


class Branches(nn.Module):
    """Layers that ranks use or not, so that their buckets are full in other orders."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(20, 20, bias=False) for _ in range(6)])

    def forward(self, used: Sequence[int]) -> Tensor:
        x = torch.ones(20)
        for number in used:
            x = self.layers[number](x)
        return x.sum()


@on_ranks(4, timeout=120)
def test_ranks_that_use_other_layers_do_not_mix_up_buckets() -> None:
    with groups() as found:
        rank, results = collectives.rank(), {}
        for kind in ("none", "hierarchy"):
            torch.manual_seed(0)
            model = Branches()
            inner = torch.optim.SGD(model.parameters(), lr=0.001)
            optimizer: Any = DistributedOptimizer(
                inner,
                model.named_parameters(),
                compression="bf16,min=1,warmup=0" if kind == "hierarchy" else "none",
                bucket_bytes=1600,
                name=f"{kind}{next(numbers)}.",
                round_order=RoundOrder(found) if kind == "hierarchy" else None,
            )
            model.layers[3].requires_grad_(False)
            for step in range(6):
                if step == 3:  # a newcomer to the exchange
                    model.layers[3].requires_grad_(True)
                optimizer.zero_grad()
                used = [number for number in range(6) if (number + rank + step) % 3]
                if rank == 2 and step == 4:
                    used = []
                if used:
                    model(used[:: 1 if rank % 2 else -1]).backward()
                optimizer.step()
            results[kind] = torch.cat([p.detach().flatten() for p in model.parameters()])
            everyone = collectives.gather_json(results[kind].tolist(), "tests.same")
            assert all(values == everyone[0] for values in everyone)
            assert len(optimizer.exchange.buckets) == 6
            optimizer.exchange.close()
        assert (results["none"] - results["hierarchy"]).abs().max() < 1e-3


def train_on_hosts(rows: Sequence[Sequence[int]], folder: Path, options: tuple[str, ...]) -> dict[str, Any]:
    with hosts(rows):
        return train_here(options[0], folder, options[1:])


def fit(world: KeptWorld, folder: Path, *options: str, rows: Sequence[Sequence[int]] = ROWS) -> dict[str, Any]:
    return world.run(train_on_hosts, rows, folder, options, timeout=180)[0]


def state(folder: Path) -> dict[str, Any]:
    (newest,) = sorted((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))[-1:]
    loaded: dict[str, Any] = torch.load(newest / "state", weights_only=True)
    return loaded


def count_unsent(folder: Path) -> Tensor:
    parts: dict[str, Tensor] = state(folder)["exchange"]["debts"]
    return torch.cat([part.flatten().double() for _, part in sorted(parts.items())])


def make_exchange(order: RoundOrder | None) -> Any:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(40, 70)), nn.Parameter(torch.randn(7, 30))]
    return DistributedOptimizer(
        torch.optim.SGD(weights, lr=0.1),
        [(str(number), weight) for number, weight in enumerate(weights)],
        average=False,
        compression="int8,min=1,warmup=0",
        bucket_bytes=8000,
        round_order=order,
    ).exchange


def sum_unsent(state: ExchangeState) -> Tensor:
    return torch.cat([part.double() for _, part in sorted(state.unsent.items())])


@on_ranks(4)
def test_residuals_are_the_same_sum_on_other_hosts() -> None:
    """From two hosts to two others, and to a flat exchange; then what is applied and left is still all there was."""
    with groups() as found, groups([[0, 1], [2, 3]]) as others:
        exchange = make_exchange(RoundOrder(found))
        for step in range(3):
            reduce_once(exchange, step)
        saved = gather_exchange_state(exchange, exact=True)
        left = sum_unsent(saved)
        assert left.abs().sum() > 0
        for order in (RoundOrder(others), None, RoundOrder(found)):
            for kept in (saved, replace(saved, rank_tensors=[], bucket_names=None)):
                exchange = make_exchange(order)
                load_exchange_state(exchange, kept)
                again = sum_unsent(gather_exchange_state(exchange, exact=False))
                torch.testing.assert_close(again, left, rtol=1e-5, atol=1e-6)
                exact = left + reduce_once(exchange, 3)
                applied = torch.cat([p.grad.double().flatten() for p in exchange.names])
                after = sum_unsent(gather_exchange_state(exchange, exact=False))
                torch.testing.assert_close(applied + after, exact, rtol=1e-5, atol=1e-4)


def reduce_once(exchange: Any, step: int) -> Tensor:
    """Exchange gradients that depend on rank and step; return their exact sum."""
    exact = []
    for number, p in enumerate(exchange.names):
        p.grad = None
        own = gradient(10 * step + number, p.numel()).view_as(p)
        (p * own).sum().backward()
        exact.append(torch.from_numpy(summed(own.flatten())))
    exchange.finish_exchange()
    return torch.cat(exact)


def test_runs_train_as_flat_ones_and_resume_on_other_ranks(worlds: KeptWorlds, tmp_path: Path) -> None:
    flat = fit(worlds[4], tmp_path / "flat", *DIGITS, "--compression", "int8,min=64,warmup=0")
    found = fit(worlds[4], tmp_path / "run", *DIGITS, *HIERARCHY)
    assert "hierarchy 2 hosts x 2 ranks: each host adds up its gradients" in worlds[4].printed[0]
    assert abs(found["eval"]["accuracy"] - flat["eval"]["accuracy"]) < 0.05
    assert found["wire_bytes_per_step"] < 0.5 * flat["wire_bytes_per_step"]
    # Two epochs at once, or one and then the other, with each rank's residuals.
    short = (*DIGITS, *HIERARCHY, "--checkpoint-residuals", "exact")
    fit(worlds[4], tmp_path / "half", *short, "--epochs", "1")
    fit(worlds[4], tmp_path / "half", *short, "--resume")
    for key, tensor in state(tmp_path / "run")["model"].items():
        assert torch.equal(tensor, state(tmp_path / "half")["model"][key]), key
    left = count_unsent(tmp_path / "half")
    assert left.abs().sum() > 0
    # On two ranks, each on its host, and so flat.
    more = fit(worlds[2], tmp_path / "half", *DIGITS, *HIERARCHY, "--epochs", "3", "--resume", rows=[[0], [1]])
    assert more["resumed_from"] == found["steps"] and more["finished"]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[0, 1, 2], [3]], "hosts have 1 to 3 ranks; expected the same number on each"),
        ([[0, 1, 2, 3]], "all ranks are on one host"),
        ([[0], [1], [2], [3]], "each host has one rank"),
    ],
)
def test_other_hosts_fall_back_to_the_flat_exchange(
    rows: list[list[int]], reason: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    options = ("--steps", "2", "--compression", "int8,min=64,warmup=0")
    fit(worlds[4], tmp_path / "flat", "digits", *options)
    fit(worlds[4], tmp_path / "run", "digits", *options, "--hierarchy", "host", rows=rows)
    assert f"hierarchy none: {reason}" in worlds[4].printed[0]
    for key, tensor in state(tmp_path / "run")["model"].items():
        assert torch.equal(tensor, state(tmp_path / "flat")["model"][key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("gan", "--epochs", "1", "--micro-batch", "8"),
        ("digits", "--steps", "12", "--local-steps", "4", "--ema", "0.9", "--amp", "bf16", "--clip-norm", "1"),
        ("digits", "--steps", "12", "--amp", "fp16", "--shares", "3:1:2:2"),
    ],
    ids=["two optimizers", "rounds", "loss scale and shares"],
)
def test_it_combines_with_other_options(options: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path) -> None:
    found = fit(worlds[4], tmp_path / "run", *options, *HIERARCHY, "--diagnose", "--log-every", "5")
    assert found["finished"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row.get("drift") is None for row in rows)


LINE = "hierarchy 2 hosts x 2 ranks"


def run_elastic(folder: Path, faults: str, least: int) -> ElasticJob:
    """A run of four ranks, or `least`, two a host, in which these happen, to its end."""
    given = ("--epochs", "3", "--pause", "0.1", "--bucket-mib", "0.0005", "--diagnose", "--faults", faults)
    compression = ("--compression", "int8,min=1,warmup=0", "--hierarchy", "host")
    with ElasticJob(folder, "localhost:4", *given, *compression, least=least, most=4, recipe=PAIRED) as job:
        job.end()
    verify(job.run_dir)
    return job


@pytest.mark.slow
def test_the_others_go_on_without_a_rank_that_dies_in_backward(tmp_path: Path) -> None:
    """Ranks 1 and 2 share a group with rank 3, and rank 0 none; then rank 0 dies."""
    job = run_elastic(tmp_path, "backward:5:3,backward:20:0", 1)
    assert job.summary()["membership_changes"] >= 2
    assert LINE in job.said() and "hierarchy none: hosts have 1 to 2 ranks" in job.said()


@pytest.mark.slow
@pytest.mark.parametrize("point", ["round0", "round1", "round2", "round3"])
def test_four_go_on_when_a_rank_that_dies_in_a_round_is_replaced(point: str, tmp_path: Path) -> None:
    job = run_elastic(tmp_path, f"{point}:5:1,{point}:20:2", 4)
    assert job.summary()["membership_changes"] >= 2
    assert job.said().count(LINE) >= 3
