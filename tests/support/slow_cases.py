"""Cases of a parametrized test that only `make test-slow` runs."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*cases: Any) -> list[Any]:
    """Return marked cases for `parametrize`, as in `[3, *slow(2, 4)]`. A tuple has a value for each parameter."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
