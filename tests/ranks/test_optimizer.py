"""hvdtrain.torch.DistributedOptimizer in a loop of one's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.ranks.harness import run

CHECKS = Path(__file__).parent / "optimizer_checks.py"


@pytest.mark.parametrize(("kind", "ranks"), [("alone", 1), ("horovodrun", 2), ("horovodrun", 3)])
def test_own_loop(kind: str, ranks: int) -> None:
    done = run(kind, ranks, [sys.executable, str(CHECKS)])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    names = re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE)
    for name in names:
        assert output.count(f"ok {name}") == ranks, output
