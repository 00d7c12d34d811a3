"""Several models at once, each on a process set of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ranks.harness import run


def test_two_sets_of_ranks_train_apart() -> None:
    done = run("horovodrun", 3, [sys.executable, str(Path(__file__).parent / "process_set_checks.py")])
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert output.count("ok\n") == 3, output
