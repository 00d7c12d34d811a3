"""A document that cannot be written is held, and written when it can be."""

from __future__ import annotations

import json
from pathlib import Path

from hvdtrain.system.files import BufferedDocument


def test_document_waits_for_its_folder(tmp_path: Path) -> None:
    document = BufferedDocument(tmp_path / "later" / "file.json")
    document.flush()
    assert document.error is None
    document.hold({"a": 1})
    document.flush()
    assert isinstance(document.error, FileNotFoundError)
    (tmp_path / "later").mkdir()
    document.flush()
    assert document.error is None
    assert json.loads(document.path.read_text()) == {"a": 1}


def test_newer_content_replaces_what_is_held(tmp_path: Path) -> None:
    document = BufferedDocument(tmp_path / "later" / "file.json")
    document.hold({"a": 1})
    document.flush()
    document.hold({"a": 2})
    (tmp_path / "later").mkdir()
    document.flush()
    assert json.loads(document.path.read_text()) == {"a": 2}
    document.path.unlink()
    document.flush()
    assert not document.path.exists()


def test_nothing_to_write_is_no_error(tmp_path: Path) -> None:
    document = BufferedDocument(tmp_path / "none" / "file.json")
    document.hold(1)
    document.flush()
    document.hold(None)
    document.flush()
    assert document.error is None
