"""Ranks stay the same to the bit over 200 steps, whatever the method, the types and the order of things."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ranks.harness import run

CHECKS = Path(__file__).parent / "agreement_checks.py"
SPECS = ["none", "fp16", "bf16", "int8", "onebit", "qsgd:2bit", "qsgd:4bit", "qsgd:8bit", "topk:0.05"]
SPECS += ["topk:0.05,momentum=0.9", "randomk:0.1", "randomk:0.1,feedback=on", "powersgd:2"]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("specs", [SPECS[::2], SPECS[1::2]], ids=" ".join)
def test_two_hundred_steps(specs: list[str], ranks: int) -> None:
    """About 2 s a method on 2 ranks, 4 s on 3 that share 2 cores."""
    done = run("horovodrun", ranks, [sys.executable, str(CHECKS), *specs])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for spec in specs:
        assert output.count(f"ok {spec}\n") == ranks, output
