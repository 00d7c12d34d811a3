"""Skips, with words, where a machine cannot have clusters; on CI it must be able to."""

from __future__ import annotations

import os

import pytest

from tests.hosts.cluster import missing


@pytest.fixture(scope="session")
def machine_allows_clusters() -> None:
    """What every test with a cluster begins with."""
    why = missing()
    if why and os.environ.get("CI") == "true":
        pytest.fail(f"{why} (and CI=true)")
    if why:
        pytest.skip(why)
