"""The rules of the house: who imports whom, how readable the code stays, how fast commands start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cpu import children_cpu_seconds
from tests.support.house_numbers import measure
from tests.support.limits import stretch

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for path in (ROOT / "hvdtrain").rglob("*.py") if "recipes" not in path.parts)
REFERENCE = re.compile(r"`([a-z_/]+/[a-zA-Z_.-]*)(?::([A-Za-z_]+))?`")  # `torch/step.py:TorchStep`, `cluster/`


def test_rooms_import_only_from_below_and_in_no_circle() -> None:
    """The contracts in pyproject.toml, by import-linter."""
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program], capture_output=True, text=True, timeout=stretch(60), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout
    text = (ROOT / "pyproject.toml").read_text()
    rooms = {path.parent.name for path in (ROOT / "hvdtrain").glob("*/__init__.py")} - {"recipes"}
    assert rooms == set(re.findall(r'"(\w+)"', text.partition("layers = [")[2].partition("]")[0]))


def test_training_loads_no_framework_before_a_recipe_needs_it() -> None:
    """torch itself is loaded, as the transport of `hvdtrain.comm`; hvdtrain.torch and other frameworks are not."""
    code = (
        "import sys, hvdtrain.training.fit\n"
        "loaded = {name for name in sys.modules if name.split('.')[0] in ('tensorflow', 'keras', 'jax')}\n"
        "loaded |= {name for name in sys.modules if name.startswith('hvdtrain.torch')}\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=stretch(60), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_files_can_be_read_in_one_sitting() -> None:
    assert not [path for path in SOURCES if len(path.read_text().splitlines()) > 320]


def test_names_types_and_functions_are_kept_readable() -> None:
    numbers = measure()
    assert numbers.one_word_percent < 35
    assert len(numbers.defined_twice) < 10, numbers.defined_twice
    assert len(numbers.untyped_dicts) < 20, numbers.untyped_dicts
    assert numbers.longest[0] <= 60, numbers.longest
    assert numbers.most_parameters[0] <= 6, numbers.most_parameters


def test_every_path_and_name_on_the_page_of_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = REFERENCE.findall(text)
    assert len(found) > 50
    for path, name in found:
        places = [place for place in (ROOT / "hvdtrain" / path, ROOT / path, ROOT / "docs" / path) if place.exists()]
        assert places, path
        if name:
            assert re.search(rf"^(?:def|class) {name}\b", places[0].read_text(), re.MULTILINE), f"{path}:{name}"
    rooms = {path.parent.name for path in (ROOT / "hvdtrain").glob("*/__init__.py")} - {"recipes"}
    assert rooms == set(re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE))


LIGHT = ["--help", "list", "launch --help", "horovod --help", "bench --help", "bench step --help", "agent --help"]
LIGHT += ["discover --help", "discover membership --help", "ledger --help", "ledger verify --help", "doctor --help"]
LIGHT += ["evaluate --help", "predict --help", "plan --help"]


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
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=stretch(60), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_help_and_list_are_quick() -> None:
    """Within 0.25 s of CPU if nothing else runs, with room for a busy machine."""
    for args in (["--help"], ["list"]):
        begin = children_cpu_seconds()
        subprocess.run([sys.executable, "-m", "hvdtrain", *args], check=True, capture_output=True, cwd=ROOT)
        assert children_cpu_seconds() - begin < 1.0


def test_the_wheel_names_every_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    named = set(re.findall(r'"(.+?)"', text.partition("\npackages = [")[2].partition("]")[0]))
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "hvdtrain").rglob("*.py")}
    assert named == there | {"hvdtrain.recipes"}
