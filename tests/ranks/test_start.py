"""What a rank does not do before its first step."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.ranks.harness import run

# What each of them costs at the start is seconds of a core; the graph for TensorBoard is drawn as well.
TRAINING = """
import sys, hvdtrain
from hvdtrain.recipe.registry import load_recipe
assert hvdtrain.fit(load_recipe("digits")(), steps=2, run_dir=sys.argv[1])["steps"] == 2
print("imported:", {"torch._dynamo", "torch.distributed.tensor", "sympy", "sklearn", "pandas"} & set(sys.modules))
"""


def test_what_is_not_used_is_not_imported(tmp_path: Path) -> None:
    done = run("alone", 1, [sys.executable, "-c", TRAINING, str(tmp_path / "run")])
    assert done.returncode == 0 and "imported: set()" in done.stdout, done.stdout + done.stderr
