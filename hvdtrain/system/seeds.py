"""Seeds of random generators from integers.

Two sequences of numbers do not go through this, since what was drawn by them is written down and must stay what it is:
the order of a run's samples (hvdtrain.recipe.order: a resumed run continues the epoch that it began), and the hashes of
a ledger's ids (hvdtrain.ledger.rows: `hvdtrain ledger verify` reads the ledgers of earlier versions). Checksums of
tensors (hvdtrain.exchange.checksums) are computed on GPUs, by arithmetic on whole tensors.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int) -> int:
    """Return a seed from 0 to 2**63 - 1 that depends on all of the integers and on their order.

    It is the same on all hosts and in all versions of Python, takes a few microseconds, and two different sequences of
    integers have the same one only by a chance of 2**-63.
    """
    # int(): numpy's integers have another text in each of its versions.
    digest = hashlib.blake2b(repr(tuple(map(int, parts))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
