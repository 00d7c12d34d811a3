"""Kept worlds of Keras: a process keeps the backend that it has imported Keras with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.packages import require_packages
from tests.support.worlds import KeptWorld, KeptWorlds


@pytest.fixture(scope="session")
def keras_worlds(request: pytest.FixtureRequest) -> Iterator[KeptWorlds]:
    """Ranks of one backend, by their number; a module names its backends as this fixture's parameters."""
    require_packages("keras", *{request.param} - {"torch"})
    env = {"NPROC": "2", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    worlds = KeptWorlds({"KERAS_BACKEND": request.param, **env})
    yield worlds
    worlds.close()


@pytest.fixture
def keras_world(keras_worlds: KeptWorlds) -> KeptWorld:
    """Two ranks of one backend."""
    return keras_worlds[2]
