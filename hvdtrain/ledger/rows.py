"""The rows of the ledger: RUN_DIR/ledger/ says which example ids each step consumed.

A row has a range of the epoch's order, and the number and the sum of hashes of the ids that the ranks really fed to the
model, which they add up in the step's own all-reduce. It records what happened, not what was planned: `hvdtrain ledger
verify` draws the order again and compares.

The ledger consists of segments, numbered in order; a writer begins a new one and never changes an old one. A segment
that begins after step k supersedes what earlier ones say of later steps: those steps were undone.

    # hvdtrain ledger 2 seed=0 examples=1437 batch=128 first_step=1
    step,epoch,offset,fed,hash_sum
    # order 1 weights-41a8...
    1,1,0,128,277893418803

A header may end in " shares=683:341": each rank's part of the batch in 1,024ths, from `first_step` on. A line "# shares
21 683:341", or "# shares 21 even", says that they are others from a step on. They change no row: the ids of a step are
the same however they are dealt.

In rounds of local steps a rank that is lost takes along what it has changed (hvdtrain.training.open_round). A line
"# lost 40 128-192,256-320" says that after step 40 the changes of these positions of the epoch's order were lost; they
are owed to the epoch. A line "# owed 41 128-192,256-320" says that step 41 was made of these, instead of the next ones:
its row has the place where the order continues.

A run with a parameter server has more: hvdtrain.ledger.made.

A line "# order" names the file next to the segments, weights-41a8....npz, that holds what the recipe's `sampler` gave
for an epoch; an epoch without such a line was shuffled.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hvdtrain.recipe import order
from hvdtrain.recipe.order import Ids
from hvdtrain.recipe.ranges import Ranges

LEDGER_FORMAT = f"hvdtrain ledger {order.ORDER_VERSION}"  # its number is the version of the order of the ids
HEADER_PATTERN = re.compile(
    r"# hvdtrain ledger ([12]) seed=(\d+) examples=([1-9]\d*) batch=(\d+) first_step=(\d+)(?: shares=([\d:]+))?"
    r"(?: service=(\S+))?"
)
ROW_PATTERN = re.compile(r"(\d{1,18}),(\d{1,18}),(\d{1,18}),(\d{1,18}),(\d{1,18})")  # numbers fit into 64 bits
ORDER_PATTERN = re.compile(r"# order ([1-9]\d{0,17}) ((?:weights|ids)-[0-9a-f]{32})")
RANGES_PATTERN = re.compile(r"# (lost|owed) ([1-9]\d{0,17}) (\d{1,18}-\d{1,18}(?:,\d{1,18}-\d{1,18})*)")
SHARES_PATTERN = re.compile(r"# shares ([1-9]\d{0,17}) (even|\d+(?::\d+)+)")
MAX_STEP_EXAMPLES = 1 << 21  # examples in a step: up to there the sum of their 32-bit hashes is exact in a float64


class LedgerRow(NamedTuple):
    """What a step consumed: ids that are neighbours in their epoch's order."""

    step: int  # from 1
    epoch: int  # from 1
    offset: int  # the position of the first id in the epoch's order
    fed: int  # how many ids the ranks fed to the model, added up by the ranks
    hash_sum: int  # of the hashes of these ids, likewise


def format_order_line(epoch: int, key: str) -> str:
    """Return the line that names what a sampler gave for an epoch (from 1), by its key."""
    return f"# order {epoch} {key}"


def format_shares_line(step: int, shares: str) -> str:
    """Return the line that says how the batch is dealt from a step on; shares: "" if evenly."""
    return f"# shares {step} {shares or 'even'}"


def format_ranges_line(kind: str, step: int, ranges: Ranges) -> str:
    """Return the line that says which positions were lost after a step, or owed and a step was made of them.

    kind: "lost" or "owed".
    """
    return f"# {kind} {step} {','.join(f'{begin}-{end}' for begin, end in ranges)}"


def parse_ranges(text: str) -> Ranges | None:
    """Return the ranges of such a line; None if they are not sorted, disjoint, or have no positions."""
    ranges = [[int(place) for place in pair.split("-")] for pair in text.split(",")]
    places = [place for pair in ranges for place in pair]
    return ranges if places == sorted(set(places)) else None


def order_path(folder: Path, key: str) -> Path:
    """Return the file in the ledger's folder that keeps what a sampler gave."""
    return folder / f"{key}.npz"


def hash_ids(ids: Ids) -> NDArray[np.uint64]:
    """Return a 32-bit hash of each id: the upper half of splitmix64 (Steele et al., OOPSLA'14).

    Args:
        ids: (n,) int64.

    Returns:
        (n,) uint64 below 2^32.
    """
    mixed = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    upper: NDArray[np.uint64] = (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)
    return upper


def sum_id_hashes(ids: Ids) -> int:
    """Return the sum of the ids' hashes: the same in any order, and however the ids are divided among ranks."""
    return int(hash_ids(ids).sum())
