"""The advisor's choice of what is worth trying."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.compression.registry import auto_candidates
from hvdtrain.exchange.advice import format_choice
from hvdtrain.exchange.advisor import shortlist_choices

METHODS = ("none", *auto_candidates())
tables = st.integers(1, 3).flatmap(
    lambda buckets: st.lists(
        st.lists(st.floats(0.001, 10), min_size=len(METHODS), max_size=len(METHODS)), min_size=buckets, max_size=buckets
    )
)


@settings(max_examples=50, deadline=None)
@given(tables)
def test_the_best_mixture_comes_first_and_each_method_for_all_buckets_follows(table: list[list[float]]) -> None:
    def modelled(choice: tuple[str, ...]) -> float:
        return sum(row[METHODS.index(method)] for row, method in zip(table, choice, strict=True))

    choices = shortlist_choices(modelled, METHODS, len(table))
    assert math.isclose(modelled(choices[0]), sum(min(row) for row in table), rel_tol=1e-4)
    rest = [modelled(choice) for choice in choices[1:]]
    assert rest == sorted(rest)
    assert {(method,) * len(table) for method in METHODS} <= set(choices)
    assert len(set(choices)) == len(choices)


def test_choices_are_shown_briefly() -> None:
    assert format_choice(("int8",)) == format_choice(("int8", "int8")) == "int8"
    assert format_choice(("none", "int8", "none")) == "2xnone+1xint8"
