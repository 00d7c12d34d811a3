"""JSON as it is written and as it is read back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.system import messages
from hvdtrain.system.files import PRIVATE_MODE, write_json
from hvdtrain.system.strict_json import check_count, check_entries, check_finite_number, encode_json, parse_strict_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_whatever_is_written_is_json(value: Any) -> None:
    parse_strict_json(encode_json(value).encode())


def test_numbers_that_are_not_finite_become_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)]}
    write_json(tmp_path / "file", value, PRIVATE_MODE)
    assert json.loads((tmp_path / "file").read_text()) == {"a": None, "b": [None, [None, 1.5]]}
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "is_launched", lambda: True)
        patch.setenv("HVDTRAIN_SECRET", "0" * 64)
        messages.send_message(messages.RankProgress(loss=math.nan))
    assert "null" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "[-Infinity]", "{", "", "[" * 100_000, "\xff"])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_strict_json(text.encode("latin-1"))


@pytest.mark.parametrize("value", ["1", None, True, -1, 1.0, 2**64, [], {}])
def test_counts_are_integers(value: Any) -> None:
    with pytest.raises(ValueError, match="as x; expected an integer from 0 on"):
        check_count(value, "x")


@pytest.mark.parametrize("value", ["1", None, False, math.nan, -math.inf, 10**400, [1.0]])
def test_numbers_are_finite(value: Any) -> None:
    with pytest.raises(ValueError, match="as x; expected a finite number"):
        check_finite_number(value, "x")


def test_objects_have_exactly_the_entries_that_are_expected() -> None:
    assert check_entries({"a": 1}, "x.", "a") == {"a": 1}
    for content, text in (([], "has no object 'x'"), ({}, r"lacks x\.a"), ({"a": 1, "b": 2}, r"unknown entry x\.b")):
        with pytest.raises(ValueError, match=text):
            check_entries(content, "x.", "a")
