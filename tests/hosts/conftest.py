"""Skips, with words, where a machine cannot have clusters; on CI it must be able to."""

from __future__ import annotations

import pytest

from tests.hosts.cluster import missing
from tests.ranks.harness import skip_or_fail


@pytest.fixture(scope="session")
def machine_allows_clusters() -> None:
    """What every test with a cluster begins with."""
    skip_or_fail(missing())
