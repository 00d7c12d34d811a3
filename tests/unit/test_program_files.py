"""Which files are programs: by their syntax alone, whatever their shape, and nothing is imported or run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdtrain.cli.programs import is_program_file
from hvdtrain.system.errors import UserError
from tests.support.marked_files import write_marked_files

BASE = "from hvdtrain.torch import Recipe\nclass Base(Recipe): pass\n"
HOROVOD = """
import argparse, torch
import torch.nn as nn
import torch.nn.functional as F
import horovod.torch as hvd
parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
args = parser.parse_args()
hvd.init()
class Net(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
        self.fc = nn.Linear(4, 1)
    def forward(self, x):
        return F.relu(self.fc(x))
class Sampler(torch.utils.data.Sampler): pass
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(Net().parameters(), lr=0.1))
"""
NOTEBOOK = """#!/usr/bin/env python
# coding: utf-8
# In[1]:
import torch
# In[ ]:
get_ipython().run_line_magic('matplotlib', 'inline')
get_ipython().system('pip install torch')
class Net(torch.nn.Module): pass
"""
KERAS = "import keras\nclass Layer(keras.layers.Layer): pass\nclass Stop(keras.callbacks.Callback): pass\n"
FLAX = (
    "import flax.linen as nn, jax, optax\nfrom flax import nnx\nclass A(nn.Module): pass\nclass B(nnx.Module): pass\n"
)
HF = "from transformers import Trainer, PreTrainedModel as P\nclass T(Trainer): pass\nclass M(P): pass\n"
LIGHTNING = "import lightning as L\nclass M(L.LightningModule): pass\nclass D(L.LightningDataModule): pass\n"
TYPING = "import abc\nfrom typing import *\nT = TypeVar('T')\nclass A(Protocol[T]): pass\nclass B(abc.ABC, A): pass\n"
SIX = "import six\nclass Meta(type): pass\nclass A(six.with_metaclass(Meta, object)): pass\n"
MATCH = (
    "import sys\nmatch sys.argv:\n    case [_]:\n        class A: pass\n    case _:\n        class A(Exception): pass\n"
)
INNER = (
    "def main():\n    from torch import nn\n    class Net(nn.Module):\n        class Config: pass\n    return Net()\n"
)
TRIES = "try:\n    from torch.nn import Module as Base\nexcept ImportError:\n    Base = object\nclass Net(Base): pass\n"
STORED = "import torch.nn as nn\nclass Net(nn.Module): pass\nfor layer in (): pass\nclass Deep(Net): pass\n"
GENERIC = "import dataclasses\n@dataclasses.dataclass\nclass Config:\n    lr: float = 0.1\nclass Wide(Config): pass\n"
FUNCTION = "from hvdtrain.torch import DistributedOptimizer\nclass Mine: pass\noptimizer = DistributedOptimizer\n"
PROGRAMS: dict[str, dict[str, str]] = {
    "a line": {"mine.py": "print('hello')\n"},
    "an empty file": {"mine.py": ""},
    "comments and a docstring with a recipe": {"mine.py": "'''class Mine(Recipe)'''\n# class Mine(Recipe): pass\n"},
    "Horovod's own example": {"mine.py": HOROVOD},
    "an exported notebook": {"mine.py": NOTEBOOK},
    "keras": {"mine.py": KERAS},
    "flax": {"mine.py": FLAX},
    "transformers": {"mine.py": HF},
    "lightning": {"mine.py": LIGHTNING},
    "old lightning": {"mine.py": LIGHTNING.replace("lightning as L", "pytorch_lightning as L")},
    "typing": {"mine.py": TYPING},
    "a metaclass": {"mine.py": "class Meta(type): pass\nclass A(metaclass=Meta): pass\n"},
    "six": {"mine.py": SIX},
    "match": {"mine.py": MATCH},
    "classes in functions": {"mine.py": INNER},
    "a class of try and except": {"mine.py": TRIES},
    "a class of if and else": {"mine.py": "if True:\n    Base = object\nelse:\n    Base = dict\nclass A(Base): pass\n"},
    "a conditional base": {"mine.py": "import torch\nclass A(torch.nn.Module if torch else object): pass\n"},
    "for TYPE_CHECKING alone": {
        "mine.py": "import typing\nif typing.TYPE_CHECKING:\n    from acme import Base\nclass A: x: 'Base'\n"
    },
    "own classes": {"mine.py": STORED},
    "dataclasses": {"mine.py": GENERIC},
    "named tuples": {"mine.py": "from collections import namedtuple\nclass P(namedtuple('P', ['a', 'b'])): pass\n"},
    "a star of torch": {"mine.py": "from torch.nn import *\nclass Net(Module): pass\n"},
    "a star of an unknown package": {"mine.py": "from acme import *\nclass A(Exception): pass\nclass B: pass\n"},
    "an unknown package that is no base": {"mine.py": "import acme\nacme.run()\nclass A(object): pass\n"},
    "a neighbour's class": {
        "mine.py": "from models import Net\nclass Mine(Net): pass\n",
        "models.py": "from torch import nn\nclass Net(nn.Module): pass\n",
    },
    "a package's class": {
        "mine.py": "from pkg.models import Net\nimport pkg\nclass Mine(Net): pass\nclass Other(pkg.Base): pass\n",
        "pkg/__init__.py": "from .models import Net as Base\n",
        "pkg/models.py": "import torch\nclass Net(torch.nn.Module): pass\n",
    },
    "a neighbour with a recipe that is not used": {"mine.py": "import base\nclass A: pass\n", "base.py": BASE},
    "hvdtrain in a loop of its own": {"mine.py": FUNCTION},
    "Recipe imported alone": {"mine.py": "from hvdtrain.torch import Recipe\nprint(Recipe)\n"},
    "a class called Recipe": {"mine.py": "class Recipe: pass\nclass Mine(Recipe): pass\n"},
    "an unknown name": {"mine.py": "class Mine(Undefined): pass\n"},
    "a circle": {
        "mine.py": "from base import B\nclass A(B): pass\n",
        "base.py": "from mine import A\nclass B(A): pass\n",
    },
    "a generator of classes": {
        "mine.py": "def make(name):\n    class Made: pass\n    return type(name, (Made,), {})\n"
    },
    "async and lambda": {"mine.py": "async def f():\n    class A(Exception): pass\ng = lambda base: base\n"},
}
FOUND = "from hvdtrain.torch import Recipe\n"
RECIPES: dict[str, dict[str, str]] = {
    "a recipe": {"mine.py": BASE},
    "a recipe with a main": {
        "mine.py": BASE + "if __name__ == '__main__':\n    import hvdtrain\n    hvdtrain.fit(Base())\n"
    },
    "a recipe two files away": {
        "mine.py": "from near import Base\nclass Mine(Base): pass\n",
        "near.py": "from pkg.far import Base\n",
        "pkg/__init__.py": "",
        "pkg/far.py": BASE,
    },
    "a star of a neighbour": {"mine.py": "from near import *\nclass Mine(Base): pass\n", "near.py": BASE},
    "a conditional recipe": {"mine.py": FOUND + "class Mine(Recipe if True else object): pass\n"},
    "a recipe or a module": {"mine.py": FOUND + "import torch\nclass Mine(torch.nn.Module, Recipe): pass\n"},
    "a shipped recipe": {"mine.py": "from hvdtrain.recipes.digits import Digits\nclass Mine(Digits): pass\n"},
    "for TYPE_CHECKING": {
        "mine.py": "import typing\nif typing.TYPE_CHECKING:\n    import hvdtrain.torch as h\nclass A(h.Recipe): pass\n"
    },
    "a recipe that is loaded": {
        "mine.py": "from hvdtrain.recipe.registry import load_recipe as load\nclass Mine(load('digits')): pass\n"
    },
    "a recipe and what is unclear": {"mine.py": BASE + "from acme import Other\nclass Mine(Other): pass\n"},
}
UNCLEAR: dict[str, tuple[dict[str, str], str]] = {
    "an unknown package": ({"mine.py": "from acme import Base\nclass Mine(Base): pass\n"}, "Mine may be"),
    "an unknown package's module": ({"mine.py": "import acme\nclass Mine(acme.models.Base): pass\n"}, "Mine may be"),
    "a star of an unknown package": ({"mine.py": "from acme import *\nclass Mine(Base): pass\n"}, "Mine may be"),
    "a call": ({"mine.py": "def make(): return object\nclass Mine(make()): pass\n"}, "Mine may be"),
    "an item": ({"mine.py": "BASES = [object]\nclass Mine(BASES[0]): pass\n"}, "Mine may be"),
    "type()": ({"mine.py": "Base = type('Base', (object,), {})\nclass Mine(Base): pass\n"}, "Mine may be"),
    "several bases by a star": ({"mine.py": "BASES = (object,)\nclass Mine(*BASES): pass\n"}, "Mine may be"),
    "a loop's name": ({"mine.py": "for Base in [object]: pass\nclass Mine(Base): pass\n"}, "Mine may be"),
    "a name of match": ({"mine.py": "match 1:\n    case Base:\n        class Mine(Base): pass\n"}, "Mine may be"),
    "a name of a global": (
        {"mine.py": "def f():\n    global Base\n    Base = 1\nclass Mine(Base): pass\n"},
        "Mine may be",
    ),
    "a parameter": ({"mine.py": "def f(base):\n    class Mine(base): pass\n"}, "Mine, in f, may be"),
    "a function's import": (
        {"mine.py": "def f():\n    import acme\n    class Mine(acme.B): pass\n"},
        "Mine, in f, may be",
    ),
    "a recipe in a function": ({"mine.py": FOUND + "def f():\n    class Mine(Recipe): pass\n"}, "Mine, in f, is"),
    "a recipe in a class": ({"mine.py": FOUND + "class A:\n    class Mine(Recipe): pass\n"}, "Mine, in A, is"),
    "a method's class": (
        {"mine.py": FOUND + "class A:\n    def f(self):\n        class Mine(Recipe): pass\n"},
        "Mine, in A.f, is",
    ),
    "a wrapped recipe": ({"mine.py": FOUND + "import six\nclass Mine(six.wraps(Recipe)): pass\n"}, "Mine may be"),
    "a neighbour that does not parse": (
        {"mine.py": "from near import Base\nclass Mine(Base): pass\n", "near.py": "def\n"},
        "Mine may be",
    ),
    "a name of try": (
        {"mine.py": "try:\n    from acme import B\nexcept ImportError:\n    B = object\nclass Mine(B): pass\n"},
        "Mine may be",
    ),
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_file_without_a_possible_recipe_is_a_program(tmp_path: Path, case: str) -> None:
    assert is_program_file(str(write_marked_files(tmp_path, PROGRAMS[case])))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", RECIPES)
def test_a_file_with_a_recipe_is_none(tmp_path: Path, case: str) -> None:
    assert not is_program_file(str(write_marked_files(tmp_path, RECIPES[case])))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_unclear_is_refused_with_both_ways(tmp_path: Path, case: str) -> None:
    files, which = UNCLEAR[case]
    path = write_marked_files(tmp_path, files)
    with pytest.raises(UserError) as refused:
        is_program_file(str(path))
    text = str(refused.value)
    assert text.startswith(f"{path} is not run: its class {which} a recipe, as far as") and "\n" not in text
    assert f"`hvdtrain launch {path}:Mine`" in text and f"`hvdtrain launch -- python {path}`" in text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from acme.core import Env\nclass Mine(Env): pass\n", True),
        ("import acme as a\nclass Mine(a.Env): pass\nclass Other(a.core.Env): pass\n", True),
        ("from acme import *\nclass Mine(Env): pass\n", True),
        ("from acme.training import Base\nclass Mine(Base): pass\n", False),
        ("from acme import Missing\nclass Mine(Missing): pass\n", None),
        ("from acme.lazy import Env\nclass Mine(Env): pass\n", None),
        ("from acme.binary import Env\nclass Mine(Env): pass\n", None),
        ("from acme.filled import Env\nclass Mine(Env): pass\n", None),
    ],
)
def test_installed_packages_are_read_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: bool | None
) -> None:
    """None: only running the package would show it."""
    files = {"__init__.py": "from . import core\nfrom .core import *\n", "training.py": BASE}
    files |= {"core.py": "import abc\nclass Env(abc.ABC): pass\n", "filled.py": "globals().update(a())\n"}
    files |= {"lazy.py": "def __getattr__(name): return 1\n"}
    site = tmp_path / "site"
    write_marked_files(site, {f"acme/{name}": content for name, content in files.items()})
    (site / "acme" / "binary.so").touch()
    monkeypatch.syspath_prepend(str(site))
    path = str(write_marked_files(tmp_path, {"mine.py": text}))
    if expected is None:
        with pytest.raises(UserError, match="its class Mine may be a recipe"):
            is_program_file(path)
    else:
        assert is_program_file(path) is expected
    assert not (tmp_path / "ran").exists() and not (site / "ran").exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"# -*- coding: latin-1 -*-\nname = '\xe9'\nclass A(Exception): pass\n", True),
        (b"\xef\xbb\xbfimport torch\nclass A(torch.nn.Module): pass\n", True),
        (b"\xef\xbb\xbffrom hvdtrain.torch import Recipe\r\nclass A(Recipe):\r\n    pass\r\n", False),
        (b"x = 1\r\nclass A:\r\n\tpass\r\n", True),
        (b"print('\\d')\nx = 1 is 1\n", True),
        (b"x = 1\nprint 'python 2'\n", "SyntaxError: Missing parentheses in call to 'print'.* \\(line 2\\)"),
        (b"import torch\n%matplotlib inline\n", "SyntaxError: invalid syntax \\(line 2\\)"),
        (b"!pip install torch\n", "SyntaxError: invalid syntax \\(line 1\\)"),
        (b"name = '\xe9'\n", "SyntaxError: .* \\(line 1\\)|SyntaxError: .*utf-8"),
        (b"# coding: klingon\n", "SyntaxError: .*klingon"),
        (b"\x7fELF\x02\x01\x01\0\0", "SyntaxError: "),
        (b"def f():\n  if x:\n", "expected an indented block.* \\(line 2\\)"),
    ],
)
def test_encodings_and_files_that_do_not_parse(tmp_path: Path, data: bytes, expected: bool | str) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(data)
    if isinstance(expected, bool):
        assert is_program_file(str(path)) is expected
        return
    with pytest.raises(UserError, match=expected) as refused:
        is_program_file(str(path))
    assert str(refused.value).startswith(f"{path} ") and "\n" not in str(refused.value)


def test_data_folders_of_the_same_name_are_not_read(tmp_path: Path) -> None:
    """A package next to the script is followed by name, not walked: it may hold a million files."""
    path = write_marked_files(
        tmp_path, {"mine.py": "import data\nclass A(data.Base): pass\n", "data/__init__.py": "class Base: pass\n"}
    )
    deep = tmp_path / "data" / "images"
    deep.mkdir()
    deep.chmod(0)
    assert is_program_file(str(path))
    deep.chmod(0o700)
