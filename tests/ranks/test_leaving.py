"""Ranks that leave in the middle of what others do end nobody's process, and hold nobody up."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ranks.harness import run

CHECKS = Path(__file__).parent / "leaving_checks.py"
ROUNDS = 40


def test_what_is_handed_over_while_another_leaves_ends(tmp_path: Path) -> None:
    done = run("horovodrun", 2, [sys.executable, str(CHECKS), str(tmp_path), str(ROUNDS)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("ok leaving\n") == 2
