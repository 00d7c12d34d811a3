"""Every method on 2, 4 and 8 ranks: right sums, the same bits everywhere, and bytes that do not grow with the ranks."""

from __future__ import annotations

import functools
import json
import re
import sys
from pathlib import Path

import pytest

from tests.ranks.harness import run

CHECKS = Path(__file__).parent / "wire_checks.py"
NAMES = re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE)
VALUES = 500 * 500 + 500 * 70
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
FLAGS = 2 * 4  # bytes a step that say which parameters were used


@functools.cache
def output(ranks: int) -> str:
    """What the ranks print, in one go."""
    done = run("horovodrun", ranks, [sys.executable, str(CHECKS)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sent(ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in a step by each method, without its flags."""
    counted: dict[str, int] = json.loads(output(ranks).split("BYTES", 1)[1].splitlines()[0])
    ring = 2 * (ranks - 1) / ranks
    return {method: total / 2 - FLAGS * ring for method, total in counted.items()}


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_sums_are_right_and_the_same_on_all_ranks(ranks: int) -> None:
    for name in NAMES:
        assert output(ranks).count(f"ok {name}\n") == ranks, output(ranks)


@pytest.mark.parametrize("method", PAYLOADS)
def test_bytes_do_not_grow_with_the_ranks(method: str) -> None:
    """As a ring's they come to twice the payload, but for the last blocks of the parts."""
    for ranks in (2, 4, 8):
        payload = sent(ranks)[method] / (2 * (ranks - 1) / ranks)
        assert 0.999 * PAYLOADS[method] - 8 <= payload <= 1.05 * PAYLOADS[method] + 8, (ranks, payload)
    assert sent(8)[method] <= 1.75 * 1.05 * sent(2)[method]


def test_topk_sends_its_payload_to_every_other_rank() -> None:
    first = sent(2)["topk:0.01"]
    # Of 285,000 values one in 100, as a float32 and a place of 32 bits, in one or two buckets.
    assert first == pytest.approx(2850 * 8, rel=0.001)
    for ranks in (4, 8):
        assert sent(ranks)["topk:0.01"] == pytest.approx((ranks - 1) * first, rel=0.001)
