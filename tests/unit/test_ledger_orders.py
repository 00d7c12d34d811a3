"""Ledgers of runs whose epochs were shuffled by earlier versions, and of many examples."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.ledger.rows import LedgerRow, sum_id_hashes
from hvdtrain.ledger.verify import verify_ledger
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe import order
from hvdtrain.system.errors import UserError
from hvdtrain.training.position import Position

FIRST_ORDER = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]  # of 10 examples, seed 0, first epoch, as version 1 drew it


def write_version_1(folder: Path, ids: list[int], batch: int = 4) -> None:
    rows = [
        f"{1 + begin // batch},1,{begin},{len(part := ids[begin : begin + batch])},{sum_id_hashes(np.array(part))}"
        for begin in range(0, len(ids), batch)
    ]
    lines = ["# hvdtrain ledger 1 seed=0 examples=10 batch=4 first_step=1", ",".join(LedgerRow._fields), *rows, ""]
    (folder / "ledger").mkdir()
    (folder / "ledger" / "segment-000001.csv").write_text("\n".join(lines))


def test_a_ledger_of_the_first_order_is_verified_with_it(tmp_path: Path) -> None:
    write_version_1(tmp_path, FIRST_ORDER)
    assert verify_ledger(tmp_path).format_lines() == ["exactly once: 1 epoch x 10 examples, 3 steps (1 segment)"]


def test_a_wrong_id_in_a_ledger_of_the_first_order_is_named(tmp_path: Path) -> None:
    write_version_1(tmp_path, [*FIRST_ORDER[:5], 2, *FIRST_ORDER[6:]])
    texts = [finding.text for finding in verify_ledger(tmp_path).findings]
    assert texts[0] == "step 2 (epoch 1): id 5 not fed, id 2 fed instead"
    assert texts[1].startswith("epoch 1: id 5 not visited")


def test_a_run_may_change_to_the_new_order_between_epochs(tmp_path: Path) -> None:
    write_version_1(tmp_path, FIRST_ORDER)
    ledger = Ledger(seed=0, examples=10, batch=4, from_step=3)
    ledger.open_for_writing(tmp_path / "ledger")
    for step, ids in enumerate(order.iterate_batches(10, 4, 0, 1), start=4):
        ledger.append_row(LedgerRow(step, 2, (step - 4) * 4, len(ids), sum_id_hashes(ids)))
    ledger.close()
    assert (tmp_path / "ledger" / "segment-000002.csv").read_text().startswith("# hvdtrain ledger 2 seed=0 ")
    assert verify_ledger(tmp_path).format_lines() == ["exactly once: 2 epochs x 10 examples, 6 steps (2 segments)"]


def test_the_verdict_on_many_examples_needs_little_memory(tmp_path: Path) -> None:
    """Today's order has no need to be in memory; a whole epoch of a hundred million ids would take 800 MB."""
    examples, batch = 10**8, 1000
    ledger = Ledger(seed=3, examples=examples, batch=batch)
    ledger.open_for_writing(tmp_path / "ledger")
    for step, ids in zip(range(1, 101), order.iterate_batches(examples, batch, 3, 0), strict=False):
        ledger.append_row(LedgerRow(step, 1, (step - 1) * batch, len(ids), sum_id_hashes(ids)))
    ledger.close()
    tracemalloc.start()
    lines = verify_ledger(tmp_path).format_lines()
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    text = "exactly once: 0 epochs x 100000000 examples and 100000 examples of epoch 1, which is not complete"
    assert lines == [f"{text}, 100 steps (1 segment)"]


def test_a_checkpoint_within_an_epoch_of_another_order_is_refused() -> None:
    # As an earlier version wrote it: without the order's version.
    within = Position(step=2, offset=8, samples=8, examples=10, seed=0)
    with pytest.raises(UserError) as refused:
        within.set_example_order(10, 0)
    assert str(refused.value) == (
        "cannot resume at example 8 of an epoch that another version of hvdtrain has shuffled differently; resume from "
        "a checkpoint at the end of an epoch, or with that version"
    )
    between = Position(step=3, epoch=1, samples=10, examples=10, seed=0)
    between.set_example_order(10, 0)
    assert between.order_version == order.ORDER_VERSION
    between.advance_past_step(4, (1.0, 4.0))
    between.set_example_order(10, 0)
