"""Run on 2, 4 and 8 ranks by test_wire_bytes.py: every codec's sums against sums in float64, and the bytes it sends."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings

import numpy as np
import torch
from torch import nn

import hvdtrain
from hvdtrain.collectives import ops
from tests.ranks.channels import channel, exchange, gradient, summed
from tests.ranks.wire_rank import traffic

warnings.simplefilter("error")
WORLD = hvdtrain.init()
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
COUNTED = ["none", "fp16", "bf16", "int8", "onebit", "qsgd:4bit", "randomk:0.01", "powersgd:4", "topk:0.01"]


def assert_same_on_all(text: str, seen: hashlib._Hash) -> None:
    everyone = ops.gather_json(seen.hexdigest(), "wire.same")
    assert len(set(everyone)) == 1, f"{text}: other bits on other ranks"


def check_all_that_is_given_is_applied_or_owed() -> None:
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
            assert c.finite(), (text, step)
            seen.update(c.flat.numpy().tobytes())
        assert_same_on_all(text, seen)
        debt = c.debt()
        assert debt is not None
        exact, owed = summed(given), summed(debt)
        # An all-reduce in float16 rounds the sums on their way, which nobody remembers.
        tolerance = 2e-3 if text.startswith("fp16") else 1e-5
        off = np.abs(exact - applied - owed).max() / (np.abs(exact).max() + np.abs(owed).max())
        assert off < tolerance, (text, off)
        assert owed.any(), text


def check_casts_are_off_by_their_rounding() -> None:
    """fp16 rounds each share and each partial sum, bf16 each share and the sum: half a step of the last bit."""
    for text, half in (("fp16", 2.0**-11), ("bf16", 2.0**-8)):
        c = channel(text, SHAPES)
        seen = hashlib.sha256()
        for step in range(STEPS):
            g = gradient(step, N)
            exact, size = summed(g), summed(g.abs())
            off = np.abs(exchange(c, step, g).double().numpy() - exact)
            assert c.finite(), (text, step)
            seen.update(c.flat.numpy().tobytes())
            roundings = WORLD.size if text == "fp16" else 2
            assert (off <= roundings * half * size * 1.01 + 1e-6).all(), (text, step)
        assert_same_on_all(text, seen)


def check_unbiased_methods_come_to_the_mean() -> None:
    """Of the same gradients 50 times over: without a bias, the mean's error has a fiftieth of the variance of one."""
    trials, g = 50, gradient(0, N)
    exact = summed(g)
    for text in UNBIASED:
        c = channel(text, SHAPES)
        seen = hashlib.sha256()
        single, total = 0.0, np.zeros(N)
        for step in range(trials):
            off = exchange(c, step, g).double().numpy() - exact
            assert c.finite(), (text, step)
            seen.update(c.flat.numpy().tobytes())
            single += float(np.square(off).mean()) / trials
            total += off / trials
        assert_same_on_all(text, seen)
        assert np.square(total).mean() < 1.5 * single / trials, (text, np.square(total).mean() / single * trials)
        assert single > 0, text


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(500, 500, bias=False), nn.Linear(500, 70, bias=False))


def print_bytes() -> None:
    """{method: bytes that rank 0 sends in two steps}: powersgd sends the factors in turns. All ranks send as many."""
    counted = {text: traffic(two_layers, text, steps=2).counted for text in COUNTED}
    everyone = ops.gather_json(counted, "wire.counted")
    assert all(other == everyone[0] for other in everyone), everyone
    if WORLD.rank == 0:
        print("BYTES", json.dumps(counted), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(f"ok {name}", flush=True)
    print_bytes()
    sys.exit(0)
