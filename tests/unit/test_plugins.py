"""Components register themselves: hvdtrain's own by their modules, those of other distributions by entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdtrain.system.errors import UserError
from hvdtrain.system.plugins import Registry, registering

GROUP = "hvdtrain.test_shapes"
REGISTRY: Registry[type] = Registry("shape", GROUP, "shapes_package")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[type]]:
    """One with a package of its own, and a second distribution that names three shapes."""
    own = tmp_path / "shapes_package"
    own.mkdir()
    (own / "__init__.py").write_text("")
    header = "from tests.unit import test_plugins as t\nfrom hvdtrain.system.plugins import registering\n"
    (own / "circle.py").write_text(f"{header}@registering(t.REGISTRY, 'circle')\nclass Circle: pass\n")
    (tmp_path / "outside_shapes.py").write_text(
        f"{header}@registering(t.REGISTRY, 'square')\nclass Square: pass\nclass Silent: pass\n"
    )
    about = tmp_path / "outside_shapes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-shapes\nVersion: 1.0\n")
    points = "square = outside_shapes:Square\nsilent = outside_shapes:Silent\nbroken = no_such_module:Shape\n"
    (about / "entry_points.txt").write_text(f"[{GROUP}]\n{points}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys.modules[__name__], "REGISTRY", Registry("shape", GROUP, "shapes_package"))
    yield REGISTRY
    for name in ("shapes_package", "shapes_package.circle", "outside_shapes"):
        sys.modules.pop(name, None)


def test_own_and_outside_components_are_found_by_name(registry: Registry[type]) -> None:
    assert registry.names() == ["circle", "square", "silent", "broken"]
    assert "outside_shapes" not in sys.modules
    assert registry.get("circle").__name__ == "Circle" and registry.get("square").__name__ == "Square"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sqare", "'sqare' is not a shape; expected one of circle, square, silent, broken; did you mean 'square'?"),
        (
            "broken",
            "the shape 'broken' of outside-shapes cannot be loaded: ModuleNotFoundError: No module named "
            "'no_such_module'; repair or uninstall that package",
        ),
        (
            "silent",
            "the shape 'silent' of outside-shapes does not register itself under that name when outside_shapes:Silent "
            "is imported",
        ),
    ],
)
def test_what_is_not_there_or_does_not_load_is_one_line(registry: Registry[type], name: str, text: str) -> None:
    with pytest.raises(UserError) as error:
        registry.get(name)
    assert str(error.value) == text


def test_a_name_is_registered_once(registry: Registry[type]) -> None:
    circle = registry.get("circle")
    assert registering(registry, "circle")(circle) is circle
    with pytest.raises(ValueError, match="two components are registered as the shape 'circle'"):
        registry.register("circle", int)
