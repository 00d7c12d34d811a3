"""The house rules: rooms import only from below, commands start fast, the wheel holds everything."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the top down: each imports only from those after it.
ROOMS = [
    "cli",
    "launch",
    "doctor",
    "bench",
    "training",
    "preemption",
    "elastic",
    "diagnosis",
    "ledger",
    "frameworks",
    "torch",
    "exchange",
    "compression",
    "recipe",
    "comm",
    "native",
    "system",
]
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax"}
SOURCES = sorted(path for path in (ROOT / "hvdtrain").rglob("*.py") if "recipes" not in path.parts)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, in functions too unless only its top level counts."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(ROOT / "hvdtrain").parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_from_below(path: Path) -> None:
    own = room(path)
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "hvdtrain" and len(parts) > 1 and parts[1] in ROOMS and own in ROOMS:
            assert ROOMS.index(parts[1]) >= ROOMS.index(own), f"{path} imports {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_some_rooms_import_torch_and_only_comm_horovod(path: Path) -> None:
    imported = {module.split(".")[0] for module in imports(path)}
    if room(path) not in ("bench", "torch", "exchange", "compression", "comm"):
        assert not imported & FRAMEWORKS
    if room(path) != "comm":
        assert "horovod" not in imported


def test_training_loads_no_framework_before_a_recipe_needs_it() -> None:
    """torch itself is loaded, as the transport of `hvdtrain.comm`; hvdtrain.torch and other frameworks are not."""
    code = (
        "import sys, hvdtrain.training.fit\n"
        "loaded = {name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'keras', 'jax')}\n"
        "loaded |= {name for name in sys.modules if name.startswith('hvdtrain.torch')}\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 330


LIGHT = ["--help", "list", "launch --help", "horovod --help", "bench --help", "bench step --help", "agent --help"]
LIGHT += ["discover --help", "discover membership --help", "ledger --help", "ledger verify --help", "doctor --help"]


@pytest.mark.parametrize("args", [text.split() for text in LIGHT], ids=LIGHT)
def test_light_commands_import_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from hvdtrain.cli.main import main\n"
        f"try: main({args!r})\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "heavy = {'torch', 'torchvision', 'horovod', 'sklearn', 'tensorboard', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_and_list_are_quick() -> None:
    """Within 0.3 s where nothing else runs; the best of several tries, with room for a busy machine."""
    for args in (["--help"], ["list"]):
        tries = []
        for _ in range(5):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "hvdtrain", *args], check=True, capture_output=True, cwd=ROOT)
            tries.append(time.perf_counter() - begin)
        assert min(tries) < 1.0


def test_the_wheel_names_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    named = set(re.findall(r'"(.+?)"', text.partition("\npackages = [")[2].partition("]")[0]))
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hvdtrain").rglob("*.py")}
    assert named == there | {"hvdtrain.recipes"}
