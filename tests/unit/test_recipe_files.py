"""Nothing that is not a recipe is run, whatever its shape; what can be one is, by any path or name."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdtrain.cli.main import main
from hvdtrain.cli.options import recipe_name
from hvdtrain.recipe import registry
from hvdtrain.recipe.base import FRAMEWORK_NAMES, FRAMEWORK_RECIPES
from hvdtrain.recipe.framework import FRAMEWORKS as FRAMEWORK_REGISTRY
from hvdtrain.recipe.options import option_fields
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.system.errors import UserError
from tests.support.marked_files import write_marked_files

# The marker is written by every file of a case; (files, is it run and a recipe).
RECIPE = "from hvdtrain.torch import Recipe\nclass Mine(Recipe): pass\n"
BASE = "from hvdtrain.torch import Recipe\nclass Base(Recipe): pass\n"
NOT_RECIPES = {
    "a script": {"mine.py": "print('hello')\n"},
    "an empty file": {"mine.py": ""},
    "a torch module": {
        "mine.py": "import torch\nfrom torch import nn\nclass A(nn.Module): pass\nclass B(torch.nn.Module): pass\n"
    },
    "a class without bases": {"mine.py": "class Recipe: pass\nclass Mine(Recipe): pass\n"},
    "Recipe imported and not used": {"mine.py": "from hvdtrain.torch import Recipe, option\nclass Mine: pass\n"},
    "Recipe in a comment": {"mine.py": "# class Mine(Recipe)\n'''class Mine(Recipe): pass'''\n"},
    "stdlib bases": {
        "mine.py": "import collections, enum\nfrom typing import Generic, NamedTuple, TypeVar\nT = TypeVar('T')\n"
        "class A(enum.Enum): X = 1\nclass B(NamedTuple): x: int\nclass C(Generic[T]): pass\nclass D(list[int]): pass\n"
        "class E(collections.namedtuple('P', 'a b')): pass\nclass F(Exception): pass\n"
    },
    "a Recipe of another package's": {
        "mine.py": "from recipes_of import Recipe\n",
        "recipes_of.py": "class Recipe: pass\n",
    },
    "a neighbour's class": {
        "mine.py": "from base import Base\nclass Mine(Base): pass\n",
        "base.py": "class Base: pass\n",
    },
    "a neighbour's class by its module": {
        "mine.py": "import base as b\nclass Mine(b.Base): pass\n",
        "base.py": "import torch\nclass Base(torch.nn.Module): pass\n",
    },
    "a package's class": {
        "mine.py": "from pkg import Base\nclass Mine(Base): pass\n",
        "pkg/__init__.py": "from .inner import Base\n",
        "pkg/inner.py": "class Base(object): pass\n",
    },
    "a circle": {
        "mine.py": "from base import Base\nclass Mine(Base): pass\n",
        "base.py": "from mine import Mine\nclass Base(Mine): pass\n",
    },
    "a class that derives from itself": {"mine.py": "class Mine(Mine): pass\n"},
    "an own class in a function": {
        "mine.py": "from hvdtrain.torch import Recipe\ndef f():\n    class Mine(Recipe): pass\n"
    },
    "hvdtrain's other names": {
        "mine.py": "import hvdtrain.torch\nclass Mine(hvdtrain.torch.DistributedOptimizer): pass\n"
    },
    "a loop of one's own": {
        "mine.py": "from hvdtrain.data import Arrays\nfrom hvdtrain.jax import allreduce_gradients\n"
        "import hvdtrain.keras as hvd\nimport keras\nfrom flax import linen as nn\nimport equinox as eqx\n"
        "class A(nn.Module): pass\nclass B(eqx.Module): pass\nclass C(keras.Model): pass\nclass D(Arrays): pass\n"
        "class E(hvd.callbacks.MetricAverageCallback): pass\noptimizer = hvd.DistributedOptimizer(None)\n"
    },
    "a star of torch": {"mine.py": "from torch.nn import *\nclass Mine(Module): pass\n"},
}
RECIPES = {
    "directly": {"mine.py": RECIPE},
    "by the package": {"mine.py": "import hvdtrain.torch\nclass Mine(hvdtrain.torch.Recipe): pass\n"},
    "by an alias of the package": {"mine.py": "import hvdtrain.torch as ht\nclass Mine(ht.Recipe): pass\n"},
    "from hvdtrain": {"mine.py": "from hvdtrain import torch as ht\nclass Mine(ht.Recipe): pass\n"},
    "by its inner module": {"mine.py": "from hvdtrain.torch.recipe import Recipe as R\nclass Mine(R): pass\n"},
    "by an assigned name": {"mine.py": "from hvdtrain.torch import Recipe\nBase = Recipe\nclass Mine(Base): pass\n"},
    "by two classes": {"mine.py": BASE + "class Mixin: pass\nclass Mine(Mixin, Base): pass\n"},
    "in if and try": {
        "mine.py": "try:\n    from hvdtrain.torch import Recipe\nexcept ImportError:\n    Recipe = object\n"
        "if True:\n    class Mine(Recipe): pass\n"
    },
    "a neighbour": {"mine.py": "from base import Base\nclass Mine(Base): pass\n", "base.py": BASE},
    "a neighbour's module": {"mine.py": "import base\nclass Mine(base.Base): pass\n", "base.py": BASE},
    "a neighbour's star": {"mine.py": "from base import *\nclass Mine(Base): pass\n", "base.py": BASE},
    "a neighbour of a neighbour": {
        "mine.py": "from base import Base as B\nclass Mine(B): pass\n",
        "base.py": "from deep import Base\n",
        "deep.py": BASE,
    },
    "a relative import": {"mine.py": "from .base import Base\nclass Mine(Base): pass\n", "base.py": BASE},
    "a relative module": {"mine.py": "from . import base\nclass Mine(base.Base): pass\n", "base.py": BASE},
    "a package": {
        "mine.py": "from pkg import Base\nclass Mine(Base): pass\n",
        "pkg/__init__.py": "from .inner import Base\n",
        "pkg/inner.py": "from . import deep\nBase = deep.Base\n",
        "pkg/deep.py": BASE,
    },
    "a package's module": {
        "mine.py": "import pkg.inner\nclass Mine(pkg.inner.Base): pass\n",
        "pkg/__init__.py": "",
        "pkg/inner.py": BASE,
    },
    "a folder without __init__": {
        "mine.py": "from parts.base import Base\nclass Mine(Base): pass\n",
        "parts/base.py": BASE,
    },
    "a call": {"mine.py": "from hvdtrain.torch import Recipe\ndef make(): return Recipe\nclass Mine(make()): pass\n"},
    "an expression": {"mine.py": "from hvdtrain.torch import Recipe\nBASES = [Recipe]\nclass Mine(BASES[0]): pass\n"},
    "a class in a class": {
        "mine.py": "from hvdtrain.torch import Recipe\nclass O:\n    class I(Recipe): pass\nclass Mine(O.I): pass\n"
    },
    "a loop's variable": {
        "mine.py": "from hvdtrain.torch import Recipe\nfor B in [Recipe]: pass\nclass Mine(B): pass\n"
    },
    "an installed package": {"mine.py": "from acme.training import Base\nclass Mine(Base): pass\n"},
}

FRAMEWORKS = {
    "import hvdtrain.jax\nclass Mine(hvdtrain.jax.Recipe): pass\n": "jax",
    "import hvdtrain.jax as hj\nclass Mine(hj.Recipe): pass\n": "jax",
    "from hvdtrain import jax\nclass Mine(jax.Recipe): pass\n": "jax",
    "from hvdtrain.jax import Recipe, option\nfrom hvdtrain.data import Arrays\nclass Mine(Recipe): pass\n": "jax",
    "from hvdtrain.torch import DistributedOptimizer\nfrom base import Base\nclass Mine(Base): pass\n": "jax",
    "import hvdtrain.keras as hk\nclass Mine(hk.Recipe): pass\n": "keras",
    "from hvdtrain.keras import Recipe as R\nfrom hvdtrain.jax import broadcast\nclass Mine(R): pass\n": "keras",
    "from hvdtrain.keras.recipe import Recipe\nclass Mine(Recipe): pass\n": "keras",
    "from hvdtrain.recipes.digits import Digits\nclass Mine(Digits): pass\n": "torch",
    "from hvdtrain.recipe import Recipe\nclass Mine(Recipe): framework = 'acme'\n": "",
}


@pytest.fixture(autouse=True)
def clean_imports(tmp_path: Path) -> Iterator[None]:
    before, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.path[:], sys.meta_path[:] = path, finders


@pytest.mark.parametrize("case", NOT_RECIPES)
def test_what_is_not_a_recipe_is_refused_and_not_run(tmp_path: Path, case: str) -> None:
    path = write_marked_files(tmp_path, NOT_RECIPES[case])
    with pytest.raises(UserError) as refused:
        load_recipe(str(path))
    assert str(refused.value).startswith(f"{path} defines no recipe, and was not run: subclass")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", RECIPES)
def test_what_is_a_recipe_is_loaded(tmp_path: Path, case: str) -> None:
    path = write_marked_files(tmp_path, RECIPES[case])
    if case == "an installed package":
        site = tmp_path / "site"
        write_marked_files(site, {"acme/__init__.py": "", "acme/training.py": BASE})
        sys.path.append(str(site))
    assert load_recipe(f"{path}:Mine").__name__ == "Mine"
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", [["train"], ["list"], ["train", "--epochs", "1"]])
def test_commands_refuse_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    path = write_marked_files(tmp_path, {"mine.py": "print('side effect')\n"})
    with pytest.raises(SystemExit) as left:
        main([*command, str(path)])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
        f"hvdtrain: error: {path} defines no recipe, and was not run: subclass hvdtrain.torch.Recipe, "
        f"hvdtrain.jax.Recipe or hvdtrain.keras.Recipe, or start it as a program: hvdtrain launch {path}"
    )
    assert "side effect" not in out and not (tmp_path / "ran").exists()


def test_list_never_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_marked_files(
        tmp_path / "recipes", {"mine.py": RECIPE, "other.py": "from base import Base\nclass Other(Base):\n    'Doc.'\n"}
    )
    write_marked_files(tmp_path / "recipes", {"base.py": BASE, "script.py": "1 / 0\n", "broken.py": "def\n"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["list"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {"mine", "other", "base", "digits"} <= set(listed) and not {"script", "broken"} & set(listed)
    assert [found.summary for found in registry.find_all_recipes() if found.name == "other"] == ["Doc."]
    assert [found.framework for found in registry.find_all_recipes() if found.name == "other"] == ["torch"]
    assert not (tmp_path / "recipes" / "ran").exists()


@pytest.mark.parametrize("text", FRAMEWORKS)
def test_the_framework_is_that_of_the_base_by_syntax_alone(tmp_path: Path, text: str) -> None:
    base = "import hvdtrain.jax\nclass Base(hvdtrain.jax.Recipe): pass\n"
    path = write_marked_files(tmp_path, {"mine.py": text, "base.py": base})
    assert [(found.class_name, found.framework) for found in registry.find_recipes_in_file(path)] == [
        ("Mine", FRAMEWORKS[text])
    ]
    assert not (tmp_path / "ran").exists()


def test_list_shows_the_recipes_of_one_framework(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "import hvdtrain.NAME as h\nclass Mine(h.Recipe): ...\n"
    paths = [
        str(write_marked_files(tmp_path / name, {"mine.py": text.replace("NAME", name)}))
        for name in ("torch", "jax", "keras")
    ]
    for name, path in zip(("torch", "jax", "keras"), paths, strict=True):
        with pytest.raises(SystemExit) as left:
            main(["list", "--framework", name, *paths])
        assert left.value.code == 0
        assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["other:"], [path, name]]
    with pytest.raises(SystemExit) as left:
        main(["list", "--framework", "jaxx"])
    assert left.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "hvdtrain: error: --framework 'jaxx' is not a framework; did you mean 'jax'?"
    assert not list(tmp_path.glob("*/ran"))


def test_the_names_of_frameworks_are_those_that_there_are() -> None:
    frameworks = FRAMEWORK_REGISTRY.load_all()
    assert {framework.recipe_class for framework in frameworks.values()} <= set(FRAMEWORK_RECIPES)
    assert set(frameworks) <= set(FRAMEWORK_NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\nclass Mine(:\n", "mine.py cannot be imported: SyntaxError: invalid syntax (line 4)"),
        ("x = '\0'\n", "mine.py cannot be imported: SyntaxError: source code string cannot contain null bytes"),
        ("x = (\n", "mine.py cannot be imported: SyntaxError: '(' was never closed (line 3)"),
    ],
)
def test_a_file_that_does_not_parse_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write_marked_files(tmp_path, {"mine.py": text})
    with pytest.raises(UserError) as refused:
        load_recipe(str(path))
    assert str(refused.value) == f"{tmp_path}/{message}"
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("text")
    with pytest.raises(UserError, match=r"mine.txt is not a Python file: the name of a recipe's file ends in .py$"):
        load_recipe(str(tmp_path / "mine.txt"))
    with pytest.raises(UserError, match=r"^no recipe file '/no/such:file.py'$"):
        load_recipe("/no/such:file.py")
    path = write_marked_files(tmp_path, {"mine.py": RECIPE})
    with pytest.raises(UserError, match=r"has no recipe class 'Min'; did you mean 'Mine'\?$"):
        load_recipe(f"{path}:Min")
    assert not (tmp_path / "ran").exists()


def test_a_path_may_have_colons(tmp_path: Path) -> None:
    path = write_marked_files(tmp_path / "run:1", {"mine.py": BASE + "class Mine(Base): pass\n"})
    assert load_recipe(str(path)).__name__ == "Mine"
    assert load_recipe(f"{path}:Base").__name__ == "Base"
    assert recipe_name(str(path)) == "mine" and recipe_name(f"{path}:Base") == "mine:Base"
    assert recipe_name("digits:Wide") == "digits:Wide" and recipe_name("a/b/digits.py") == "digits"
    odd = tmp_path / "a:b.py"
    odd.write_text(RECIPE)
    assert load_recipe(str(odd)).__name__ == "Mine" and load_recipe(f"{odd}:Mine").__name__ == "Mine"


def test_relative_imports_in_a_package_reach_its_other_modules(tmp_path: Path) -> None:
    package = tmp_path / "outer" / "inner"
    write_marked_files(package, {"mine.py": "from .sizes import N\nfrom ..common import M\nfrom . import K\n" + RECIPE})
    write_marked_files(package, {"sizes.py": "from .. import common\nN = 4 + common.M\n", "__init__.py": "K = 2\n"})
    write_marked_files(package.parent, {"__init__.py": "", "common.py": "M = 3\n"})
    module = sys.modules[load_recipe(str(package / "mine.py")).__module__]
    assert (module.N, module.M, module.K) == (7, 3, 2)


def test_neighbours_of_one_recipe_are_not_those_of_another(tmp_path: Path) -> None:
    for folder, size in (("a", 1), ("b", 2)):
        write_marked_files(
            tmp_path / folder, {"mine.py": f"import sizes\n{RECIPE}    N = sizes.N\n", "sizes.py": f"N = {size}\n"}
        )
        text = (
            (tmp_path / folder / "mine.py").read_text().replace("class Mine(Recipe): pass\n", "class Mine(Recipe):\n")
        )
        (tmp_path / folder / "mine.py").write_text(text)
    assert [load_recipe(str(tmp_path / folder / "mine.py")).N for folder in "aba"] == [1, 2, 1]  # type: ignore[attr-defined]


def test_an_edit_between_two_loads_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one in the same second, of the same size, which Python's cache of bytecode does not see."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    found = []
    for number in (1, 2):
        files = {"mine.py": f"from sizes import N\nM = {number}\n" + RECIPE, "sizes.py": f"N = {number}\n"}
        path = write_marked_files(tmp_path, files)
        for name in files:
            os.utime(tmp_path / name, (1_000_000_000, 1_000_000_000))
        module = sys.modules[load_recipe(str(path)).__module__]
        found.append((module.N, module.M))
    assert found == [(1, 1), (2, 2)]


TYPE_CHECKING = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar
from hvdtrain.torch import Recipe
if TYPE_CHECKING:
    from collections import OrderedDict as Table
@dataclass(kw_only=True)
class Mine(Recipe):
    cache: ClassVar[Table] = None
    size: int | None = None
    name: {type} = "a"
"""


def test_only_the_hints_of_fields_are_resolved(tmp_path: Path) -> None:
    cls = load_recipe(str(tmp_path / _typed(tmp_path, "str")))
    assert [(f.name, f.type, f.optional) for f in option_fields(cls)][-2:] == [
        ("size", int, True),
        ("name", str, False),
    ]


def test_a_hint_that_cannot_be_resolved_is_one_line(tmp_path: Path) -> None:
    cls = load_recipe(str(tmp_path / _typed(tmp_path, "Table")))
    with pytest.raises(UserError) as refused:
        option_fields(cls)
    assert str(refused.value) == (
        "the type 'Table' of Mine.name cannot be resolved: NameError: name 'Table' is not defined; import what it "
        "names outside of `if TYPE_CHECKING`"
    )


def _typed(folder: Path, kind: str) -> str:
    (folder / "typed.py").write_text(TYPE_CHECKING.replace("{type}", kind))
    return "typed.py"


def test_an_unknown_framework_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "from dataclasses import dataclass\nimport hvdtrain.recipe\n@dataclass(kw_only=True)\n"
    path = write_marked_files(
        tmp_path, {"mine.py": f"{text}class Mine(hvdtrain.recipe.Recipe):\n    framework = 'mxnet'\n"}
    )
    with pytest.raises(SystemExit) as left:
        main(["train", str(path)])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "hvdtrain: error: Mine.framework is 'mxnet'; expected 'jax', 'keras', 'torch': derive the recipe from "
        "hvdtrain.jax.Recipe, hvdtrain.keras.Recipe or hvdtrain.torch.Recipe\n"
    )


def test_launch_reports_a_typo_before_any_host_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("hvdtrain.launch.start.check_hosts", lambda *args, **kwargs: asked.append(args))
    with pytest.raises(SystemExit) as left:
        main(["launch", "-H", "192.0.2.1:1,192.0.2.2:1", "--nic", "lo", "digits", "--epocs", "1"])
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith("hvdtrain: error: no option --epocs; did you mean '--epochs'?\n")
    assert not asked
