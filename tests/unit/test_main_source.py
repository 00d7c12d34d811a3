"""A class of a notebook or script, written to a file of its own: with all that it uses, or refused by name."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from hvdtrain.recipe.main_source import make_main_source
from hvdtrain.recipe.source import import_source
from hvdtrain.system.errors import UserError


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A __main__ as a notebook has it."""
    module = ModuleType("__main__")
    vars(module)["In"] = [""]
    monkeypatch.setitem(sys.modules, "__main__", module)
    yield module
    for name in [name for name in linecache.cache if name.startswith("/cells/")]:
        del linecache.cache[name]


def run_cell(main: ModuleType, text: str) -> None:
    """Execute a cell as IPython does."""
    cells = vars(main)["In"]
    name = f"/cells/{len(cells)}.py"
    cells.append(text)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec", dont_inherit=True), vars(main))


def import_written(main: ModuleType, tmp_path, name: str = "Mine") -> type:
    """Return the class, of the file that is written for it."""
    source = make_main_source(vars(main)[name], tmp_path)
    (tmp_path / source.main).write_bytes(source.files[source.main])
    return getattr(import_source(source), name)


def test_what_a_class_uses_is_written_with_it(main, tmp_path) -> None:
    run_cell(
        main, "import os.path\nimport collections as c\nfrom math import *\nfrom functools import lru_cache\nLR = 1"
    )
    run_cell(main, "unused = open\nsizes = [1, 2]\nsizes.append(3)\nLR = 0.5\nfirst, second = divmod(7, 2)\n")
    run_cell(
        main,
        "@lru_cache\ndef double(x):\n    return 2 * x if x < 2 else again(x)\n\n"
        "def again(x):\n    return double(x - 1) + 2\n\nscale = lambda x: x * LR\n",
    )
    run_cell(main, "class Base:\n    def size(self): return sum(sizes)\n")
    run_cell(
        main,
        "from dataclasses import dataclass\nfrom pathlib import Path\n\n"
        "@dataclass(kw_only=True)\nclass Middle(Base):\n    folder: Path = Path('/a')\n    lr: float = LR\n\n"
        "class Mine(Middle):\n    @property\n    def all(self):\n"
        "        unused = scale(double(4)) + self.size() + pi\n"
        "        return unused, first, second, c.Counter('aab')['a'], os.path.join('a', 'b')\n",
    )
    found, here = import_written(main, tmp_path), vars(main)["Mine"]
    assert found().all == here().all
    assert found() == found(lr=0.5)
    assert "unused = open" not in (tmp_path / "mine.py").read_text()


def test_cells_that_were_run_again_count_as_they_last_were(main, tmp_path) -> None:
    run_cell(main, "class Mine:\n    def value(self): return helper()\n")
    run_cell(main, "def helper(): return 1\n")
    run_cell(main, "def helper(): return 2\n")
    assert import_written(main, tmp_path)().value() == 2
    old = vars(main)["Mine"]
    run_cell(main, "class Mine:\n    def value(self): return 3\n")
    assert import_written(main, tmp_path)().value() == 3
    with pytest.raises(UserError, match="class Mine was defined again since it was made: make the recipe again"):
        make_main_source(old, tmp_path)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("data = open", "cannot be written"),
        (
            "data = iter([])\ndata = object()",
            "Mine uses data, a value of type object in __main__ that cannot be",
        ),
        ("data = set()\ndata.add(open)", "Mine uses data, a value of type set in"),
        (
            "import types\ndata = types.SimpleNamespace()\ndata.x = 1",
            "Mine uses data, a value of type SimpleNamespace in",
        ),
        ("exec('def data(): pass')", "the source of the function data cannot be had: define it in a file"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(before, message, main, tmp_path) -> None:
    run_cell(main, before)
    run_cell(main, "class Mine:\n    def value(self): return data\n")
    if before == "data = open":  # of a module
        assert import_written(main, tmp_path)().value() is open
        return
    with pytest.raises(UserError, match=message):
        make_main_source(vars(main)["Mine"], tmp_path)


def test_classes_without_a_text_or_in_a_function_are_refused(main, tmp_path) -> None:
    run_cell(main, "def make():\n    class Mine:\n        pass\n    return Mine\nMine = make()\n")
    with pytest.raises(UserError, match=r"Mine is defined in a function or class.*define it at the top"):
        make_main_source(vars(main)["Mine"], tmp_path)
    exec("class Prompt:\n    def value(self): return 1\n", vars(main))
    with pytest.raises(UserError, match=r"the source of the class Prompt cannot be had: .* not by exec\(\)"):
        make_main_source(vars(main)["Prompt"], tmp_path)
