"""hvdtrain.data.Lines: the lines of a file by their numbers."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.data import Lines, lines
from hvdtrain.system.errors import UserError

TEXTS = {
    b"": [],
    b"\n": [""],
    b"one": ["one"],
    b"one\n": ["one"],
    b"one\r\n\r\ntwo\n\nthree": ["one", "", "two", "", "three"],
    "\u00e4\u2028b\n\u00f6\n".encode(): ["\u00e4\u2028b", "\u00f6"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hvdtrain" / "lines"


@pytest.mark.parametrize("text", TEXTS)
def test_a_file_is_the_list_of_its_lines(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "text").write_bytes(text)
    found = Lines(tmp_path / "text")
    assert [found[i] for i in range(len(found))] == TEXTS[text]
    assert [found[-i] for i in range(len(found), 0, -1)] == TEXTS[text]
    with pytest.raises(IndexError, match=f"line {len(found)} of {len(found)}"):
        found[len(found)]


@given(st.lists(st.binary(max_size=5).filter(lambda line: b"\n" not in line)), st.integers(1, 7))
def test_blocks_of_any_size_find_the_same_lines(
    tmp_path_factory: pytest.TempPathFactory, texts: list[bytes], block: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "text"
    path.write_bytes(b"\n".join(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = Lines(path, "latin-1")
    expected = texts if texts and texts[-1] else texts[:-1]
    assert [found[i].encode("latin-1") for i in range(len(found))] == [line.removesuffix(b"\r") for line in expected]


def test_the_index_is_made_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a\nb\n")
    index = tmp_path / ".text.lines"
    assert len(Lines(tmp_path / "text")) == 2
    made = index.stat().st_ino
    assert len(Lines(tmp_path / "text")) == 2
    assert index.stat().st_ino == made
    (tmp_path / "text").write_text("a\nb\nc\n")
    assert Lines(tmp_path / "text")[2] == "c"
    index.write_bytes(index.read_bytes()[:-3])  # as a machine leaves it that lost its power
    assert Lines(tmp_path / "text")[2] == "c"
    assert [path.name for path in tmp_path.iterdir() if "lines" in path.name] == [".text.lines"]


def test_an_index_that_cannot_be_written_next_to_the_file_is_in_the_cache(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "text").write_text("a\nb\n")
    (tmp_path / ".text.lines").mkdir()
    assert Lines(tmp_path / "text")[1] == "b"
    assert len(list(cache.iterdir())) == 1
    (cache.parent / "lines").rename(cache.parent / "old")
    cache.write_text("")
    with pytest.raises(UserError, match=r"Lines\('.*text'\): .*: Is a directory"):
        Lines(tmp_path / "text")


def test_a_pickle_opens_the_same_file_or_refuses_another(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a\nb\n")
    data = pickle.dumps(Lines(tmp_path / "text"))
    assert pickle.loads(data)[1] == "b"  # noqa: S301 its own
    status = (tmp_path / "text").stat()
    os.utime(tmp_path / "text", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match="has changed since its dataset was made"):
        pickle.loads(data)  # noqa: S301 its own


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No such file or directory"):
        Lines(tmp_path / "text")
