"""Compressed gradients over real ranks: channels, the exchange, and training with every method."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.ranks.harness import run

CHECKS = Path(__file__).parent / "compression_checks.py"
NAMES = re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE)


@pytest.mark.parametrize(("kind", "ranks"), [("alone", 1), ("horovodrun", 2), ("horovodrun", 3)])
def test_channels_and_exchange(kind: str, ranks: int) -> None:
    check(kind, ranks, [name for name in NAMES if name != "check_quality"])


def test_quality() -> None:
    """About 20 s."""
    check("horovodrun", 2, ["check_quality"])


def check(kind: str, ranks: int, names: list[str]) -> None:
    done = run(kind, ranks, [sys.executable, str(CHECKS), *names])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for name in names:
        assert output.count(f"ok {name}\n") == ranks, output
