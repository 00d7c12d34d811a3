"""Ledgers of runs with a parameter server: each item once, none too old, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hvdtrain.ledger.made import AppliedItem, MadeVersion, parse_made_line
from hvdtrain.ledger.reader import find_segments
from hvdtrain.ledger.rows import LedgerRow, sum_id_hashes
from hvdtrain.ledger.verify import verify_ledger
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.order import SampleOrder
from hvdtrain.recipe.ranges import list_ids

EXAMPLES = 20


def append(ledger: Ledger, step: int, epoch: int, items: list[tuple[int, int, int]]) -> None:
    """Append a version, made of items (read, begin, end)."""
    made = MadeVersion(0.1, [AppliedItem(*item) for item in items])
    ids = list_ids(SampleOrder(EXAMPLES, 0, epoch - 1), made.ranges)
    ledger.record_made(step, made)
    ledger.append_row(LedgerRow(step, epoch, EXAMPLES, len(ids), sum_id_hashes(ids)))


def write_run(folder: Path) -> Ledger:
    """An epoch of four items, of which the first is applied last, and the beginning of the next."""
    ledger = Ledger(0, EXAMPLES, 5)
    ledger.service = "bounded:1/1/3/1/8"
    ledger.open_for_writing(folder / "ledger")
    append(ledger, 1, 1, [(0, 5, 10)])
    append(ledger, 2, 1, [(0, 10, 15), (1, 15, 18)])
    append(ledger, 3, 1, [(2, 18, 20)])
    append(ledger, 4, 1, [(0, 0, 5)])
    append(ledger, 5, 2, [(4, 5, 10)])
    return ledger


def test_an_epoch_whose_items_come_in_any_order_is_exact(tmp_path: Path) -> None:
    write_run(tmp_path).close()
    found = verify_ledger(tmp_path)
    assert (found.findings, found.epochs, found.rest, found.steps) == ([], 1, 5, 5)
    lines = found.format_lines()
    assert lines[0].startswith("exactly once: 1 epoch x 20 examples and 5 examples of epoch 2")
    assert lines[1] == "staleness: mean 0.67, at most 3 versions"


def test_a_later_segment_has_the_versions_that_are_in_memory(tmp_path: Path) -> None:
    ledger = write_run(tmp_path)
    ledger.roll_back(3)
    append(ledger, 4, 1, [(1, 0, 5)])
    ledger.close()
    found = verify_ledger(tmp_path)
    assert (found.findings, found.epochs, found.rest, found.segments) == ([], 1, 0, 2)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda t: t.replace("# made 4 0.1 0:0-5", "# made 4 0.1 0:0-6"), "ids", "are not the 6 of its items"),
        (lambda t: t.replace("# made 4 0.1 0:0-5", "# made 4 0.1 0:1-6"), "epoch", "applied again in step 4"),
        (lambda t: t.replace("# made 4 0.1 0:0-5", "# made 4 0.1 0:1-6"), "epoch", "never applied"),
        (lambda t: t.replace("# made 4 0.1 0:0-5", "# made 4 0.1 0:0-25"), "ids", "0 to 25 of 20 is impossible"),
        (lambda t: t.replace("# made 3 0.1 2:", "# made 3 0.1 3:"), "place", "expected of a version before"),
        (lambda t: t.replace("bounded:1/1/3", "bounded:1/1/2"), "place", "expected at most 2 versions old"),
        (lambda t: t.replace("bounded:1", "sync"), "place", "step 2 (epoch 1): an item was computed with the weights"),
        (lambda t: t.replace("# made 3 0.1 2:18-20", "# made 3 0.1 18-20"), "file", "line 7 is not a valid row"),
        (lambda t: t.replace("\n3,1,20", "\n4,1,20", 1), "step", "step 3 is missing"),
        (lambda t: t.replace("\n5,2,20", "\n5,4,20"), "place", "step 5 is of epoch 4, expected 1"),
    ],
)
def test_what_is_wrong_with_versions_is_named(
    change: Callable[[str], str], kind: str, text: str, tmp_path: Path
) -> None:
    write_run(tmp_path).close()
    (path,) = find_segments(tmp_path / "ledger").values()
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    findings = verify_ledger(tmp_path).findings
    assert any(finding.kind == kind and text in finding.text for finding in findings), findings


def test_a_line_of_a_version_is_read_as_it_was_written() -> None:
    made = MadeVersion(0.1 / 3, [AppliedItem(3, 0, 7), AppliedItem(5, 9, 12)])
    assert parse_made_line(made.format_line(6)) == (6, made)
    assert parse_made_line("# made 6 0.1") is None
