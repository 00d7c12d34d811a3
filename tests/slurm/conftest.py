"""Skips, with words, where a machine cannot have a Slurm of its own; on CI it must be able to."""

from __future__ import annotations

import pytest

from tests.ranks.harness import skip_or_fail
from tests.slurm.cluster import missing


@pytest.fixture(scope="session")
def machine_allows_slurm() -> None:
    """What every test with Slurm begins with."""
    skip_or_fail(missing())
