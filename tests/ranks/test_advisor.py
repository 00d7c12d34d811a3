"""`--compression auto` on ranks: nothing is lost when the method changes, and all ranks change together."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import torch
from torch import nn

from hvdtrain.comm import collectives
from hvdtrain.exchange import advisor
from hvdtrain.torch import DistributedOptimizer
from tests.ranks.harness import ROOT
from tests.support.worlds import KeptWorld, on_ranks, train

MAX_STEPS = 250


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 30))


def wrapped(net: nn.Module, compression: str = "auto,min=1", lr: float = 0.05):
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    # Buckets so small that each weight has its own.
    return DistributedOptimizer(sgd, net.named_parameters(), compression=compression, bucket_bytes=1000)


def train_step(net: nn.Module, optimizer, step: int) -> None:
    inputs = torch.randn(16, 40, generator=torch.Generator().manual_seed(100 * step + collectives.rank()))
    optimizer.zero_grad()
    (net(inputs) - inputs[:, :30]).square().mean().backward()
    optimizer.step()


def assert_same_on_all(net: nn.Module) -> None:
    own = [p.detach().double().sum().item().hex() for p in net.parameters()]
    assert all(other == own for other in collectives.gather_json(own, "checks.same"))


@on_ranks(2, 3)
def test_residuals_are_carried_over_between_methods_and_skipped_steps():
    """Through changes of method and steps that are not made: what was applied and is owed is all, in float64."""
    net = model()
    optimizer = wrapped(net, lr=1.0)
    optimizer.exchange.advisor = None
    methods = itertools.cycle(["none", "onebit", "powersgd:2", "none", "topk:0.1", "int8", "fp16", "topk:0.05"])
    before = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
    exact = torch.zeros_like(before)
    chooser = advisor.Advisor(optimizer.exchange)
    for step in range(40):
        if step % 4 == 1:
            assert len(chooser._compressible_indices) == 2
            chooser._apply_choice((next(methods), next(methods)))
        shares = [
            torch.randn(p.shape, generator=torch.Generator().manual_seed(7 * step + collectives.rank()))
            for p in net.parameters()
        ]
        exact += torch.cat([share.flatten() for share in shares]).double()
        for spoilt in (True, False) if step % 2 else (False,):
            optimizer.zero_grad()
            factor = math.inf if spoilt and collectives.rank() == 0 else 1
            sum((p * share * factor).sum() for p, share in zip(net.parameters(), shares, strict=True)).backward()
            optimizer.synchronize()
            if not spoilt:
                optimizer.step()
    assert_same_on_all(net)
    owed = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in net.named_parameters()}
    for bucket in optimizer.exchange.buckets:
        debt = bucket.reducer.total_unsent()
        if debt is not None:
            parts = torch.split(debt, [p.numel() for p in bucket.params])
            owed |= {name: part.double() for name, part in zip(bucket.names, parts, strict=True)}
    mine = torch.stack([exact, torch.cat(list(owed.values()))])
    exact, debts = collectives.wait(collectives.all_reduce_async_(mine, "checks.totals")) / collectives.size()
    applied = before - torch.cat([p.detach().flatten() for p in net.parameters()]).double()
    assert debts.abs().max() > 0.1  # the last methods do owe something
    # fp16 rounds what was carried over: up to 2**-8 of values from 8 on.
    torch.testing.assert_close(applied + debts, exact, rtol=2e-3, atol=4e-3)


@on_ranks(2, 3)
def test_rank_0_decides_for_all():
    """The same advice everywhere, consistent in itself; all ranks stay the same to the bit."""
    net = model()
    optimizer = wrapped(net)
    news = []
    optimizer.exchange.advisor.log_line = news.append
    # Up to the choice: later, on a noisy machine, it may rightly go back to none.
    for step in range(MAX_STEPS):
        train_step(net, optimizer, step)
        if optimizer.exchange.advisor.advice is not None:
            break
    advice = optimizer.exchange.advisor.advice
    assert advice is not None
    advice = advice.to_json()
    assert all(other == advice for other in collectives.gather_json(advice, "checks.advice"))
    measured = {tuple(row["choice"]): row["measured_step_seconds"] for row in advice["rows"]}
    none = measured["none", "none"]
    # Those that were not left behind on the way.
    longest = max(row["measured_steps"] for row in advice["rows"])
    fastest = min(row["measured_step_seconds"] for row in advice["rows"] if row["measured_steps"] == longest)
    chosen = measured[tuple(advice["chosen"])]
    assert (
        chosen == fastest
        if tuple(advice["chosen"]) != ("none", "none")
        else fastest > advisor.MAX_MEASURED_RATIO * none
    )
    methods = [bucket.method for bucket in optimizer.exchange.buckets if bucket.compressible]
    assert methods == advice["chosen"]
    assert any("takes" in line for line in news)
    assert_same_on_all(net)


def hamper(codec) -> None:
    encode, waste = codec.encode, torch.randn(400, 400)

    def slow_encode(x, key):
        waste @ waste @ waste
        return encode(x, key)

    object.__setattr__(codec, "encode", slow_encode)


@on_ranks(2, 3)
def test_compression_slower_than_none_is_given_up_once():
    """A choice that has become slower than none is given up, and said so; one that has not is kept."""
    for slow in (True, False):
        net = model()
        optimizer = wrapped(net)
        train_step(net, optimizer, 0)
        own = optimizer.exchange.advisor
        chosen = ("topk:0.5", "topk:0.5")
        own._apply_choice(chosen)
        own.advice, news = advisor.Advice(advisor.NetworkModel(2, 0.0, 1.0), [], list(chosen), "", 0), []
        own.log_line = news.append
        # Slow: encoding is made to take long. Not slow: everything is quicker than what none is said to have taken.
        for place in own._compressible_indices if slow else ():
            hamper(optimizer.exchange.buckets[place].reducer.codec)
        own._trials = own._watch_choice(chosen, 1e-9 if slow else 1e9, interval=5)
        next(own._trials)
        for step in range(1, 40):
            train_step(net, optimizer, step)
        methods = [bucket.method for bucket in optimizer.exchange.buckets if bucket.compressible]
        assert methods == ["none" if slow else "topk:0.5"] * 2
        assert (own.advice.went_back_at_step is not None) == slow
        assert sum("back to none" in line for line in news) == slow
        assert_same_on_all(net)


def test_auto_compression_trains_and_writes_its_advice(world2: KeptWorld, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", str(ROOT / "recipes" / "digits.py")
    summary = train(world2, recipe, folder, "--compression", "auto,min=64", "--threads", "1")
    advice = json.loads((folder / "advisor.json").read_text())
    assert advice["network"]["bytes_per_second"] > 0
    assert [row["choice"] for row in advice["rows"] if set(row["choice"]) == {"none"}]
    assert summary["compression"] == "auto,min=64"
    assert summary["eval"]["accuracy"] > 0.95
    assert sum(bucket["values"] for bucket in summary["buckets"]) == 21_386
    # Resumed, it measures anew.
    before = (folder / "advisor.json").stat().st_mtime_ns
    again = train(world2, recipe, folder, "--resume", "--epochs", "38", "--threads", "1")
    assert again["resumed_from"] == summary["steps"]
    assert (folder / "advisor.json").stat().st_mtime_ns > before


def test_one_rank_has_nothing_to_choose(world1: KeptWorld, tmp_path: Path) -> None:
    folder, recipe = tmp_path / "run", str(ROOT / "recipes" / "digits.py")
    train(world1, recipe, folder, "--compression", "auto", "--steps", "3")
    assert not (folder / "advisor.json").exists()
