"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.worlds import KeptWorld, KeptWorlds


@pytest.fixture(scope="session")
def worlds() -> Iterator[KeptWorlds]:
    """Ranks that stay alive through the test run, by their number: worlds[3]."""
    kept = KeptWorlds()
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def world2(worlds: KeptWorlds) -> KeptWorld:
    """Two ranks that stay alive through the test run."""
    return worlds[2]


@pytest.fixture(scope="session")
def world3(worlds: KeptWorlds) -> KeptWorld:
    """Three ranks that stay alive through the test run."""
    return worlds[3]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "worlds" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("worlds"))  # pytest-xdist: one process has all of these tests
