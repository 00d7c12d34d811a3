"""Which ids were fed instead of those that the order names, worked out from a count and a sum of hashes.

A row holds, of the ids that were fed, their number n and the sum H of their hashes h. With the sum S of the hashes that
the order has at the same positions:

    n too small by w    neighbours in the order, such as a rank's part, were left out:  H - S = -(h_i + ... + h_(i+w-1))
    n too large by w    neighbours were fed twice:                                     H - S = h_i + ... + h_(i+w-1)
    n right             an id was fed in the place of another one:                     H - S = h_other - h_i

Every i is tried. A false explanation needs a sum that is equal by chance: one in four billion for each i.
"""

from __future__ import annotations

import numpy as np

from hvdtrain.ledger.epoch_order import MaterializedOrder
from hvdtrain.ledger.rows import LedgerRow
from hvdtrain.recipe.order import Ids

NO_IDS: Ids = np.empty(0, np.int64)


def explain_mismatch(order: MaterializedOrder, row: LedgerRow, end: int) -> tuple[Ids, Ids] | None:
    """Return the ids that were not fed and those that were fed besides, or None if no single fault explains the row.

    Args:
        order: of the row's epoch.
        row: what was fed.
        end: the position at which the step should have ended; it should have begun at `row.offset`.
    """
    before = order.hash_sums_before
    difference = row.hash_sum - int(before[end] - before[row.offset])
    planned = end - row.offset
    if row.fed < planned:
        missing = find_range_with_sum(order, -difference, planned - row.fed, row.offset, end)
        return None if missing is None else (missing, NO_IDS)
    if row.fed > planned:
        repeated = find_range_with_sum(order, difference, row.fed - planned, 0, len(order.ids))
        return None if repeated is None else (NO_IDS, repeated)
    return find_swap(order, difference, row.offset, end)


def find_range_with_sum(order: MaterializedOrder, total: int, width: int, begin: int, end: int) -> Ids | None:
    """Return the first `width` neighbours between positions `begin` and `end` whose hashes have this sum, or None."""
    before = order.hash_sums_before
    sums = before[begin + width : end + 1] - before[begin : end + 1 - width]
    found = np.flatnonzero(sums == total)
    return order.ids[begin + found[0] :][:width] if len(found) else None


def find_swap(order: MaterializedOrder, difference: int, begin: int, end: int) -> tuple[Ids, Ids] | None:
    """Return an id between two positions and one of the epoch whose hash differs from it by this much, or None."""
    wanted = order.hashes[begin:end] + difference
    exists = np.isin(wanted, order.hashes)
    if not exists.any():
        return None
    place = int(np.flatnonzero(exists)[0])
    other = int(np.flatnonzero(order.hashes == wanted[place])[0])
    return order.ids[begin + place : begin + place + 1], order.ids[other : other + 1]
