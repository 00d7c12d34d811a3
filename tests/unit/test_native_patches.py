"""The patches of Horovod's source apply exactly, or the build stops."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hvdtrain.native import source
from hvdtrain.native.patches import (
    PATCH_FOLDER,
    Condition,
    SourcePatch,
    apply_patches,
    digest_patches,
    read_patches,
    read_revision,
    select_patches,
)
from hvdtrain.system.errors import RunError

PATCH = """Why this is done.
---
diff --git a/one.txt b/one.txt
--- a/one.txt
+++ b/one.txt
@@ -1,3 +1,4 @@
 first
-second
+2
+2.5
 third
@@ -5 +6,0 @@ third
-fifth
diff --git a/two.txt b/two.txt
new file mode 100644
--- /dev/null
+++ b/two.txt
@@ -0,0 +1,2 @@
+a
+b
"""


def tree(folder: Path, text: str = "first\nsecond\nthird\nfourth\nfifth\nsixth\n") -> Path:
    (folder / "one.txt").write_text(text)
    return folder


def test_a_patch_changes_and_makes_files(tmp_path: Path) -> None:
    apply_patches(tree(tmp_path), [SourcePatch("10-a", PATCH)])
    assert (tmp_path / "one.txt").read_text() == "first\n2\n2.5\nthird\nfourth\nsixth\n"
    assert (tmp_path / "two.txt").read_text() == "a\nb\n"
    with pytest.raises(RunError, match=r"patch 10-a: one.txt, line 2: expected 'second', got '2'"):
        apply_patches(tmp_path, [SourcePatch("10-a", PATCH)])


def test_git_gets_the_same_result(tmp_path: Path) -> None:
    for name in ("ours", "gits"):
        (tmp_path / name).mkdir()
        tree(tmp_path / name)
    apply_patches(tmp_path / "ours", [SourcePatch("10-a", PATCH)])
    subprocess.run(["git", "apply", "--unidiff-zero", "-"], input=PATCH, text=True, check=True, cwd=tmp_path / "gits")
    for name in ("one.txt", "two.txt"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "gits" / name).read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0\nfirst\nsecond\nthird\nfourth\nfifth\n", "line 1: expected 'first', got '0'"),  # not where it was
        ("first\nsecond \nthird\nfourth\nfifth\n", "line 2: expected 'second', got 'second '"),
        ("first\nsecond\nthird\nfourth\n", "line 5: expected 'fifth', got 'the end of the file'"),
        ("first\nsecond\nthird\n", "one.txt has 3 lines; expected at least 4"),
    ],
)
def test_a_line_that_moved_or_changed_stops_the_build(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(RunError, match=why):
        apply_patches(tree(tmp_path, text), [SourcePatch("10-a", PATCH)])


def test_a_missing_or_existing_file_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"patch 10-a: Horovod's source has no one.txt"):
        apply_patches(tmp_path, [SourcePatch("10-a", PATCH)])
    (tree(tmp_path) / "two.txt").touch()
    with pytest.raises(RunError, match=r"patch 10-a: Horovod's source has two.txt already"):
        apply_patches(tmp_path, [SourcePatch("10-a", PATCH)])


def test_each_header_gives_the_reason_and_does_not_change_the_build() -> None:
    patches = read_patches()
    assert len(patches) >= 20 and [patch.name for patch in patches] == sorted(patch.name for patch in patches)
    for patch in patches:
        title, _, rest = patch.text.partition("\n\n")
        assert len(title) <= 120 and title.endswith(".") and len(rest.partition("\n---\n")[0]) > 100, patch.name
        assert SourcePatch(patch.name, f"Other words\n{patch.text}").hash_changes() == patch.hash_changes()
        assert SourcePatch(patch.name, f"{patch.text}+\n").hash_changes() != patch.hash_changes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_patches_apply_to_the_released_source(tmp_path: Path) -> None:
    """With git as well, each on the result of those before it; both results are the same."""
    log, env = tmp_path / "log", {**os.environ, "PYTHONPATH": str(tmp_path / "tools")}
    source.fetch_tools(tmp_path / "tools", log, env)
    released = source.fetch_source(tmp_path / "source", log, env)
    ours, gits = tmp_path / "ours", tmp_path / "gits"
    for copy in (ours, gits):
        shutil.copytree(released, copy)
    apply_patches(ours, read_patches())
    for patch in read_patches():
        for option in ("--check", "--apply"):
            subprocess.run(["git", "apply", option, "-"], input=patch.text, text=True, check=True, cwd=gits)
    for path in ours.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (gits / path.relative_to(ours)).read_bytes(), path


def test_patches_are_part_of_the_package() -> None:
    assert PATCH_FOLDER.is_dir()
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"patches/*.patch", "patches/REVISIONS"' in text and '"py.typed"' in text


def test_a_change_of_the_patches_has_a_new_revision() -> None:
    number, digest = read_revision()
    expected = digest_patches(read_patches())
    assert digest == expected, f"the patches changed: add the line '{number + 1} {expected}' to patches/REVISIONS"
    lines = (PATCH_FOLDER / "REVISIONS").read_text().splitlines()
    assert [line.split()[0] for line in lines] == [str(count + 1) for count in range(len(lines))]
    assert len({line.split()[1] for line in lines}) == len(lines)


def test_a_condition_limits_a_patch_to_some_builds() -> None:
    without = [patch.name for patch in read_patches() if patch.condition is Condition.WITHOUT_NCCL]
    assert without == ["90-without-cuda"]
    assert {patch.name for patch in select_patches(nccl=True)} | set(without) == {p.name for p in read_patches()}
    assert select_patches(nccl=False) == read_patches()
    assert SourcePatch("10-a", PATCH).condition is Condition.ALWAYS
    with pytest.raises(ValueError, match="on Tuesdays"):
        _ = SourcePatch("10-a", f"Why.\n\nCondition: on Tuesdays\n{PATCH}").condition
