"""Seeds are functions of all their integers, and stay what they are."""

from __future__ import annotations

import itertools

from hvdtrain.system.seeds import derive_seed


def test_seeds_of_earlier_versions_stay_what_they_were() -> None:
    """A resumed run draws what the run before would have drawn."""
    assert derive_seed(0, 1, 2) == 0x4BC1D33FB9121A18


def test_every_integer_and_their_order_count() -> None:
    parts = list(itertools.product((-2, -1, 0, 1, 2**40), repeat=3))
    assert len({derive_seed(*values) for values in parts}) == len(parts)
    assert derive_seed(1) != derive_seed(1, 0) != derive_seed(0, 1)


def test_seeds_fit_a_generator() -> None:
    assert all(0 <= derive_seed(value) < 2**63 for value in range(1000))
