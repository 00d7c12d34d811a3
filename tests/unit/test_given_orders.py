"""Ledgers of epochs whose order a recipe's sampler has given."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from hvdtrain.ledger.reader import read_segment
from hvdtrain.ledger.rows import LedgerRow, sum_id_hashes
from hvdtrain.ledger.verify import verify_ledger
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.given_order import GivenOrder
from hvdtrain.recipe.order import Ids, SampleOrder

ORDERS = [GivenOrder("ids", np.array([5, 5, 2, 9, 2, 2, 31, 0, 1, 5])), GivenOrder("weights", np.arange(1.0, 11))]


def write(ledger: Ledger, epochs: list[Ids], orders: list[GivenOrder | None]) -> None:
    """Append the rows of epochs of 10 examples in steps of 4, of which `epochs` were fed."""
    step = ledger.from_step
    for epoch, (ids, order) in enumerate(zip(epochs, orders, strict=True), start=1):
        ledger.begin_epoch(epoch, order)
        for begin in range(0, 10, 4):
            step, part = step + 1, ids[begin : begin + 4]
            ledger.append_row(LedgerRow(step, epoch, begin, len(part), sum_id_hashes(part)))


def list_epochs() -> tuple[list[Ids], list[GivenOrder | None]]:
    """Three epochs: of ids, of weights, and a shuffled one."""
    ids = [ORDERS[0].list_ids(0, 0), ORDERS[1].list_ids(0, 1), SampleOrder(10, 0, 2).ids_between(0, 10)]
    return ids, [*ORDERS, None]


def test_what_was_fed_in_a_given_order_is_verified_with_it(tmp_path: Path) -> None:
    ledger = Ledger(0, 10, 4)
    ledger.open_for_writing(tmp_path / "ledger")
    write(ledger, *list_epochs())
    ledger.close()
    verdict = verify_ledger(tmp_path)
    assert verdict.format_lines() == ["as ordered: 3 epochs x 10 examples, 9 steps (1 segment)"]
    assert (verdict.given_orders, verdict.is_as_ordered, verdict.is_exactly_once) == (2, True, False)


def test_what_was_not_fed_in_a_given_order_is_named(tmp_path: Path) -> None:
    ledger = Ledger(0, 10, 4)
    ledger.open_for_writing(tmp_path / "ledger")
    epochs, orders = list_epochs()
    epochs[0] = np.array([5, 5, 2, 9, 2, 2, 0, 0, 1, 5])  # 0 instead of 31
    write(ledger, epochs, orders)
    ledger.close()
    assert verify_ledger(tmp_path).format_lines() == [
        "not as ordered: 3 epochs x 10 examples, 9 steps (1 segment)",
        "step 2 (epoch 1): id 31 not fed, id 0 fed instead",
        "epoch 1: id 31 not visited (id 31 was due in step 2); id 0 visited again (id 0 in step 2)",
    ]


def test_orders_that_cannot_be_written_are_written_later(tmp_path: Path) -> None:
    ledger = Ledger(0, 10, 4)
    (tmp_path / "run").mkdir()
    ledger.open_for_writing(tmp_path / "run" / "ledger")
    shutil.rmtree(tmp_path / "run" / "ledger")
    write(ledger, *list_epochs())
    assert isinstance(ledger.error, FileNotFoundError)
    ledger.make_durable()
    ledger.close()
    segment = read_segment(tmp_path / "run" / "ledger" / "segment-000001.csv")
    assert segment.orders == {1: ORDERS[0].key, 2: ORDERS[1].key}
    assert verify_ledger(tmp_path / "run").format_lines()[0].startswith("as ordered: 3 epochs x 10 examples, 9 steps")


def test_a_ledger_forgets_the_orders_of_epochs_that_are_durable() -> None:
    ledger = Ledger(0, 10, 4)
    write(ledger, *list_epochs())
    ledger.discard_rows(4)
    ledger.begin_epoch(4, ORDERS[0])
    assert list(ledger.orders) == [2, 4]


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_file_of_an_order_is_a_finding(tmp_path: Path, order: GivenOrder) -> None:
    ledger = Ledger(0, 10, 4)
    ledger.open_for_writing(tmp_path / "ledger")
    write(ledger, *list_epochs())
    ledger.close()
    (tmp_path / "ledger" / f"{order.key}.npz").unlink()
    lines = verify_ledger(tmp_path).format_lines()
    assert lines[0].startswith("not as ordered")
    assert lines[1] == f"{tmp_path}/ledger/{order.key}.npz cannot be read: No such file or directory"
