"""Skips, with words, where a machine cannot have a Slurm of its own; on CI it must be able to."""

from __future__ import annotations

import os

import pytest

from tests.slurm.cluster import missing


@pytest.fixture(scope="session")
def machine_allows_slurm() -> None:
    """What every test with Slurm begins with."""
    why = missing()
    if why and os.environ.get("CI") == "true":
        pytest.fail(f"{why} (and CI=true)")
    if why:
        pytest.skip(why)
