"""Ledgers of runs that have lost ranks in rounds of local steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from hvdtrain.ledger.reader import find_segments
from hvdtrain.ledger.rows import LedgerRow, sum_id_hashes
from hvdtrain.ledger.verify import LedgerVerification, verify_ledger
from hvdtrain.ledger.writer import Ledger, LedgerState
from hvdtrain.recipe.order import SampleOrder
from hvdtrain.recipe.ranges import Ranges, list_ids

EXAMPLES, BATCH = 20, 8


def append(ledger: Ledger, step: int, epoch: int, offset: int, owed: Ranges | None = None) -> None:
    """Append the row of a step, of the next batch or of what is owed."""
    ranges = owed or [[offset, min(offset + BATCH, EXAMPLES)]]
    if owed:
        ledger.record_owed(step, owed)
    ids = list_ids(SampleOrder(EXAMPLES, 0, epoch - 1), ranges)
    ledger.append_row(LedgerRow(step, epoch, offset, len(ids), sum_id_hashes(ids)))


def regroup(ledger: Ledger, folder: Path, lost: dict[int, Ranges]) -> Ledger:
    """The ledger of another rank, which continues to write after a loss."""
    ledger.close()
    other = Ledger.from_state(LedgerState(**json.loads(json.dumps(asdict(ledger.to_state())))), {})
    for step, ranges in lost.items():
        other.record_lost(step, ranges)
    other.roll_back(ledger.rows[-1].step if ledger.rows else ledger.from_step)
    other.open_for_writing(folder / "ledger")
    return other


def write_run(folder: Path, *, settles: bool = True) -> Ledger:
    """An epoch of which 6 examples are lost, 2 of them twice, the last time after its last step."""
    ledger = Ledger(0, EXAMPLES, BATCH)
    ledger.open_for_writing(folder / "ledger")
    append(ledger, 1, 1, 0)
    append(ledger, 2, 1, 8)
    ledger = regroup(ledger, folder, {2: [[2, 4], [12, 16]]})
    append(ledger, 3, 1, 16, [[2, 4], [12, 16]])
    append(ledger, 4, 1, 16)
    ledger = regroup(ledger, folder, {4: [[14, 16]]})
    if settles:
        append(ledger, 5, 1, EXAMPLES, [[14, 16]])
    return ledger


def verify(folder: Path) -> LedgerVerification:
    return verify_ledger(folder)


def test_an_epoch_whose_losses_are_trained_again_is_exact(tmp_path: Path) -> None:
    ledger = write_run(tmp_path)
    append(ledger, 6, 2, 0)
    found = verify(tmp_path)
    assert found.findings == []
    assert (found.epochs, found.rest, found.steps, found.owed, found.settled) == (1, 8, 6, 8, 8)
    lines = found.format_lines()
    assert lines[0].startswith("exactly once: 1 epoch x 20 examples and 8 examples of epoch 2")
    assert lines[1] == "owed: 8 examples lost with a rank, 8 trained again"
    assert found.as_json()["owed"] == 8


def test_what_is_still_owed_leaves_the_epoch_incomplete(tmp_path: Path) -> None:
    write_run(tmp_path, settles=False)
    found = verify(tmp_path)
    assert (found.findings, found.epochs, found.rest, found.owed, found.settled) == ([], 0, 18, 8, 6)


def test_an_epoch_that_goes_on_without_what_it_owes_is_a_defect(tmp_path: Path) -> None:
    append(write_run(tmp_path, settles=False), 5, 2, 0)
    (finding,) = verify(tmp_path).findings
    missing = sorted(SampleOrder(EXAMPLES, 0, 0).ids_between(14, 16).tolist())
    assert (finding.kind, finding.epoch, sorted(finding.missing)) == ("epoch", 1, missing)
    assert "not visited (lost with a rank, and not trained again)" in finding.text


def test_a_resumed_run_supersedes_later_losses_only(tmp_path: Path) -> None:
    """Resumed after step 4, whose loss came before the checkpoint, and after step 2, whose loss came then."""
    write_run(tmp_path, settles=False).close()
    for step, rows in ((4, [(5, EXAMPLES, [[14, 16]])]), (1, [(2, 8, None), (3, 16, None)])):
        ledger = Ledger(0, EXAMPLES, BATCH, step)
        ledger.open_for_writing(tmp_path / "ledger")
        for number, offset, owed in rows:
            append(ledger, number, 1, offset, owed)
        ledger.close()
        found = verify(tmp_path)
        assert (found.findings, found.epochs, found.rest) == ([], 1, 0)
    assert (found.owed, found.settled) == (0, 0)


def test_durable_losses_are_discarded_with_their_rows(tmp_path: Path) -> None:
    ledger = write_run(tmp_path)
    ledger.make_durable()
    ledger.discard_rows(5)
    assert (ledger.lost, ledger.owed) == ({}, {})
    ledger = regroup(ledger, tmp_path, {})
    append(ledger, 6, 2, 0)
    assert verify(tmp_path).findings == []


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda t: t.replace("# owed 5 14-16\n", ""), "ids", "are impossible"),
        (lambda t: t.replace("# owed 5 14-16", "# owed 5 13-15"), "owed", "step 5 is made of 1 example not owed"),
        (lambda t: t.replace("# owed 5 14-16", "# owed 5 14-17"), "ids", "are not the 3 that were owed"),
        (
            lambda t: t.replace("# lost 4 14-16", "# lost 4 14-25"),
            "owed",
            "after step 4, 5 examples lost that nobody",
        ),
        (lambda t: t.replace("# lost 4 14-16", "# lost 9 14-16"), "owed", "examples are lost after step 9, which is"),
        (lambda t: t.replace("# lost 4 14-16", "# lost 4 16-14"), "file", "is not a valid row"),
    ],
)
def test_false_lines_are_found(change: Callable[[str], str], kind: str, text: str, tmp_path: Path) -> None:
    write_run(tmp_path).close()
    path = max(find_segments(tmp_path / "ledger").items())[1]
    content = path.read_text()
    assert change(content) != content
    path.write_text(change(content))
    findings = verify(tmp_path).findings
    assert any(one.kind == kind and text in one.text for one in findings), findings
