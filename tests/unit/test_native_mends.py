"""The changes to Horovod's source: each is made exactly once, or the build stops."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdtrain.native.mend import Mend, apply
from hvdtrain.native.mends import cmake_text, mends
from hvdtrain.system.errors import RunError


def source_of(folder: Path, changes: list[Mend]) -> Path:
    """A source tree in which every change finds its text."""
    for change in changes:
        path = folder / change.file
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text() if path.exists() else ""
        if change.old not in before:
            path.write_text(f"{before}// something else\n{change.old}\n")
    return folder


def test_each_change_is_made(tmp_path: Path) -> None:
    changes = mends("20", nccl=False, rpath=["$ORIGIN/lib"])
    source_of(tmp_path, changes)
    apply(tmp_path, changes)
    for change in changes:
        assert change.new in (tmp_path / change.file).read_text()
    assert "set(CMAKE_CXX_STANDARD 20)" in (tmp_path / "CMakeLists.txt").read_text()
    assert r'INSTALL_RPATH "\$ORIGIN/lib"' in (tmp_path / "horovod/torch/CMakeLists.txt").read_text()


def test_expected_text_missing(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("nothing of the kind\n")
    with pytest.raises(RunError, match=r"setup.py: expected 'a = 1' once, found it 0 times"):
        apply(tmp_path, [Mend("setup.py", "a = 1", "a = 2")])
    assert (tmp_path / "setup.py").read_text() == "nothing of the kind\n"


def test_expected_text_twice(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("a = 1\nb = 2\na = 1\n")
    with pytest.raises(RunError, match="found it 2 times"):
        apply(tmp_path, [Mend("setup.py", "a = 1", "a = 2")])
    assert (tmp_path / "setup.py").read_text() == "a = 1\nb = 2\na = 1\n"


def test_a_patch_to_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no CMakeLists\.txt"):
        apply(tmp_path, [Mend("CMakeLists.txt", "a", "b")])


def test_a_second_time_fails(tmp_path: Path) -> None:
    changes = mends("17", nccl=True, rpath=[])
    source_of(tmp_path, changes)
    apply(tmp_path, changes)
    with pytest.raises(RunError, match="found it 0 times"):
        apply(tmp_path, changes)


def test_cuda_is_left_out_only_without_nccl() -> None:
    assert not any(change.file.endswith("FindPytorch.cmake") for change in mends("20", nccl=True, rpath=[]))
    assert any(change.file.endswith("FindPytorch.cmake") for change in mends("20", nccl=False, rpath=[]))


def test_cmake_text_escapes_special_characters() -> None:
    assert cmake_text('$ORIGIN/"a"\\b') == r"\$ORIGIN/\"a\"\\b"
