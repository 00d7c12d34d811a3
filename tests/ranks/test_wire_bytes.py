"""Every method on 2, 4 and 8 ranks: right sums, the same bits everywhere, and bytes that do not grow with the ranks."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from hvdtrain.comm import collectives
from tests.ranks.channels import channel, exchange, gradient, summed
from tests.ranks.wire_rank import traffic
from tests.support.worlds import KeptWorld, KeptWorlds, call_on_rank, on_ranks

SHAPES = [(70, 50), (1, 13), (30, 41)]  # no whole number of blocks, for any number of ranks
N = sum(n * m for n, m in SHAPES)
STEPS = 15
# Those that remember what they have not sent.
MINDFUL = [
    "int8",
    "onebit",
    "topk:0.02",
    "randomk:0.1,feedback=on",
    "powersgd:4",
    "qsgd:4bit,feedback=on",
    "fp16,feedback=on",
]
UNBIASED = ["qsgd:2bit", "qsgd:4bit", "qsgd:8bit", "randomk:0.2"]
VALUES = 500 * 500 + 500 * 70
COUNTED = ["none", "fp16", "bf16", "int8", "onebit", "qsgd:4bit", "randomk:0.01", "powersgd:4", "topk:0.01"]
# Bytes of a step that stand for all values, before they are cut into parts.
PAYLOADS = {
    "none": 4 * VALUES,
    "fp16": 2 * VALUES,
    "bf16": 2 * VALUES,
    "int8": VALUES * 516 / 512,
    "onebit": VALUES * 132 / 1024,
    "qsgd:4bit": VALUES * 260 / 512,
    "randomk:0.01": 4 * VALUES / 100,
    "powersgd:4": 4 * 4 * (500 + 500 + 500 + 70) / 2,  # the mean of both sides
}
FLAGS = (2 + 2) * 4  # bytes a step: which parameters were used, whether others are to come, whether its number is odd


def assert_same_on_all(text: str, seen: hashlib._Hash) -> None:
    everyone = collectives.gather_json(seen.hexdigest(), "wire.same")
    assert len(set(everyone)) == 1, f"{text}: other bits on other ranks"


@on_ranks(2, 4)
def test_applied_and_residual_add_up_over_all_steps() -> None:
    """Over all steps: the sum of what was applied and of what all ranks still owe is the exact gradients' sum.

    The debt does not grow with the steps, so the mean of what is applied comes to the exact mean as 1 / steps.
    """
    for text in MINDFUL:
        c = channel(text, SHAPES)
        seen = hashlib.sha256()
        given, applied = torch.zeros(N, dtype=torch.float64), np.zeros(N)
        for step in range(STEPS):
            g = gradient(step, N)
            given += g
            applied += exchange(c, step, g).double().numpy()
            assert c.sum_is_finite(), (text, step)
            seen.update(c.flat.numpy().tobytes())
        assert_same_on_all(text, seen)
        debt = c.total_unsent()
        assert debt is not None
        exact, owed = summed(given), summed(debt)
        # An all-reduce in float16 rounds the sums on their way, which nobody remembers.
        tolerance = 2e-3 if text.startswith("fp16") else 1e-5
        off = np.abs(exact - applied - owed).max() / (np.abs(exact).max() + np.abs(owed).max())
        assert off < tolerance, (text, off)
        assert owed.any(), text


@on_ranks(2, 4)
def test_casts_are_off_by_their_rounding() -> None:
    """fp16 rounds each share and each partial sum, bf16 each share and the sum: half a step of the last bit."""
    for text, half in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        c = channel(text, SHAPES)
        seen = hashlib.sha256()
        for step in range(STEPS):
            g = gradient(step, N)
            exact, size = summed(g), summed(g.abs())
            off = np.abs(exchange(c, step, g).double().numpy() - exact)
            assert c.sum_is_finite(), (text, step)
            seen.update(c.flat.numpy().tobytes())
            roundings = collectives.size() if text == "fp16" else 2
            assert (off <= roundings * half * size * 1.01 + 1e-6).all(), (text, step)
        assert_same_on_all(text, seen)


@on_ranks(2, 4)
def test_unbiased_methods_come_to_the_mean() -> None:
    """Of the same gradients 50 times over: without a bias, the mean's error has a fiftieth of the variance of one."""
    trials, g = 50, gradient(0, N)
    exact = summed(g)
    for text in UNBIASED:
        c = channel(text, SHAPES)
        seen = hashlib.sha256()
        single, total = 0.0, np.zeros(N)
        for step in range(trials):
            off = exchange(c, step, g).double().numpy() - exact
            assert c.sum_is_finite(), (text, step)
            seen.update(c.flat.numpy().tobytes())
            single += float(np.square(off).mean()) / trials
            total += off / trials
        assert_same_on_all(text, seen)
        assert np.square(total).mean() < 1.5 * single / trials, (text, np.square(total).mean() / single * trials)
        assert single > 0, text


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(500, 500, bias=False), nn.Linear(500, 70, bias=False))


def count_bytes() -> dict[str, int]:
    """Bytes that this rank sends in two steps, by method: powersgd sends the factors in turns."""
    return {text: traffic(two_layers, text, steps=2).counted for text in COUNTED}


@pytest.fixture(scope="module")
def sent(worlds: KeptWorlds) -> dict[int, dict[str, float]]:
    """By the number of ranks and the method, bytes that a rank sends in a step, without its flags."""
    found = {}
    for ranks in (2, 4):
        first, *others = worlds[ranks].run(count_bytes)
        assert all(other == first for other in others)
        ring = 2 * (ranks - 1) / ranks
        found[ranks] = {method: total / 2 - FLAGS * ring for method, total in first.items()}
    return found


@pytest.mark.parametrize("method", PAYLOADS)
def test_bytes_do_not_grow_with_the_ranks(method: str, sent: dict[int, dict[str, float]]) -> None:
    """As a ring's they come to twice the payload, but for the last blocks of the parts."""
    for ranks, counted in sent.items():
        payload = counted[method] / (2 * (ranks - 1) / ranks)
        assert 0.999 * PAYLOADS[method] - 8 <= payload <= 1.05 * PAYLOADS[method] + 8, (ranks, payload)


def test_topk_sends_its_payload_to_every_other_rank(sent: dict[int, dict[str, float]]) -> None:
    # Of 285,000 values one in 100, as a float32 and a place of 32 bits, in one or two buckets.
    assert sent[2]["topk:0.01"] == pytest.approx(2850 * 8, rel=0.001)
    assert sent[4]["topk:0.01"] == pytest.approx(3 * sent[2]["topk:0.01"], rel=0.001)


@pytest.mark.slow
def test_sums_and_bytes_on_eight_ranks() -> None:
    with KeptWorld(8) as world:
        for check in (
            test_applied_and_residual_add_up_over_all_steps,
            test_casts_are_off_by_their_rounding,
            test_unbiased_methods_come_to_the_mean,
        ):
            world.run(call_on_rank, __name__, check.__name__, {})
        first, *others = world.run(count_bytes)
    assert all(other == first for other in others)
    for method, payload in PAYLOADS.items():
        counted = first[method] / 2 / (2 * 7 / 8) - FLAGS
        assert 0.999 * payload - 8 <= counted <= 1.05 * payload + 8, method
    assert first["topk:0.01"] / 2 - FLAGS * 7 / 4 == pytest.approx(7 * 2850 * 8, rel=0.001)
