"""Fixtures, markers and the order of all tests."""

from __future__ import annotations

import os

# Before torch is imported: the processes of pytest and their ranks are more than there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.worlds import KeptWorld, KeptWorlds

FOLDERS = {"unit", "ranks", "hosts", "slurm", "gpu"}  # each is a marker, too


@pytest.fixture(scope="session")
def worlds() -> Iterator[KeptWorlds]:
    """Ranks that stay alive through the test run, by their number: worlds[3]."""
    kept = KeptWorlds()
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def world1(worlds: KeptWorlds) -> KeptWorld:
    """One rank that stays alive through the test run, started without a launcher."""
    return worlds[1]


@pytest.fixture(scope="session")
def world2(worlds: KeptWorlds) -> KeptWorld:
    """Two ranks that stay alive through the test run."""
    return worlds[2]


@pytest.fixture(scope="session")
def world3(worlds: KeptWorlds) -> KeptWorld:
    """Three ranks that stay alive through the test run."""
    return worlds[3]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder, and keep together, in one process of pytest-xdist, what shares a fixture."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent)
        if file.parts[0] in FOLDERS:
            item.add_marker(file.parts[0])
        if item.get_closest_marker("xdist_group") is None:
            kept = "worlds" in getattr(item, "fixturenames", ())
            item.add_marker(pytest.mark.xdist_group("worlds" if kept else file.as_posix()))
