"""Fixtures, markers and the order of all tests."""

from __future__ import annotations

import os

# Before torch is imported: the processes of pytest and their ranks are more than there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fcntl
import functools
import json
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.support.limits import stretch
from tests.support.worlds import KeptWorld, KeptWorlds, close_kept_worlds

ORDER = ["slurm", "hosts", "ranks", "gpu", "unit"]  # the folders of tests, each of which is a marker, too
# Files that are too long for one process.
PARTS = {"ranks/test_faults.py": 3, "ranks/test_launch.py": 2, "ranks/test_docs.py": 4, "slurm/test_slurm.py": 2}
WORLDS = 2  # processes that keep worlds of up to three ranks: one would take longer than all others take the rest
FOUR_RANKS = {  # worlds with them: ranks have half a GB each, and not all worlds are to be there at the same time
    *("test_divided_models.py", "test_grid.py", "test_hierarchy.py", "test_local_tensors.py", "test_pipeline.py"),
    *("test_plan_command.py", "test_several_optimizers.py", "test_sharded_optimizer.py", "test_wire_bytes.py"),
}
MAX_QUICK_CASES = 2  # of a test in tests/ranks: those after them are slow

# Its limit of 200 ms for an example fails on a busy machine.
hypothesis.settings.register_profile("without time limits", deadline=None)
hypothesis.settings.load_profile("without time limits")


@pytest.fixture(scope="session")
def worlds() -> Iterator[KeptWorlds]:
    """Ranks that stay alive through the test run, by their number: worlds[3]."""
    kept = KeptWorlds()
    yield kept
    kept.close()


@pytest.fixture(autouse=True)
def environment_kept() -> Iterator[None]:
    """Put back the environment after each test: what another test launches would inherit it."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


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
    """Mark each test by its folder, and stretch its time limit. Leave further cases of tests with ranks to test-slow.

    Keep together what shares fixtures, and put what takes long first: with --no-loadscope-reorder, a process of
    pytest-xdist takes one group after the other, in the order of their first tests. The kept worlds are the longest.
    """
    quick: Counter[str] = Counter()
    for item in items:
        file = item.path.relative_to(Path(__file__).parent)
        if file.parts[0] in ORDER:
            item.add_marker(file.parts[0])
        if file.parts[0] == "ranks" and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0]
            quick[test] += 1
            if quick[test] > MAX_QUICK_CASES:
                item.add_marker("slow")
        own = item.get_closest_marker("timeout")
        limit = own.args[0] if own is not None else float(item.config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(stretch(limit)), append=False)
        item.stash[GROUP] = group(item, file)
    if "PYTEST_XDIST_WORKER" in os.environ:
        own = Path(os.environ[SHARED]) / f"groups-{os.environ['PYTEST_XDIST_WORKER']}"
        own.write_text(json.dumps({item.nodeid: item.stash[GROUP] for item in items}))
        own.replace(own.with_name(GROUPS))

    def place(item: pytest.Item) -> tuple[bool, bool, int]:
        is_alone = item.get_closest_marker("alone") is not None
        return not is_alone, not item.stash[GROUP].startswith("worlds"), ORDER.index(folder(item))

    items.sort(key=place)


def group(item: pytest.Item, file: Path) -> str:
    """The tests that one process runs: each file's, but kept worlds are shared by many files."""
    fixtures = getattr(item, "fixturenames", ())
    if "worlds" in fixtures:
        return "four ranks" if file.name in FOUR_RANKS else f"worlds {zlib.crc32(file.name.encode()) % WORLDS}"
    if item.get_closest_marker("alone"):
        return "alone"
    if "keras_worlds" in fixtures:
        return f"keras {item.callspec.params['keras_worlds']}"  # type: ignore[attr-defined]
    parts = PARTS.get(file.as_posix(), 1)
    return f"{file.as_posix()} {zlib.crc32(item.nodeid.encode()) % parts}"


def folder(item: pytest.Item) -> str:
    return next((name for name in ORDER if item.get_closest_marker(name)), ORDER[-1])


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout's, so that waiting does not count
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Let a test that measures wait until the processes of pytest-xdist run no other, and these until it is done."""
    cores = item.config.stash.get(CORES, None)
    if cores is None:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    cores.take(alone)
    try:
        return (yield)
    finally:
        if nextitem is not None and nextitem.stash[GROUP] != item.stash[GROUP]:
            close_kept_worlds()
        if not (alone and nextitem is not None and nextitem.get_closest_marker("alone")):
            cores.give_back()


class Cores:
    """The machine's cores, which tests of several processes share, or one has alone: a lock that is fair to both."""

    def __init__(self, folder: Path) -> None:
        self.turn, self.held = ((folder / name).open("w") for name in ("turn.lock", "cores.lock"))
        self.mine = False

    def take(self, alone: bool) -> None:
        if self.mine:
            return  # from the test before, which was alone too
        fcntl.flock(self.turn, fcntl.LOCK_EX)  # who waits here keeps later ones from going before
        fcntl.flock(self.held, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self.turn, fcntl.LOCK_UN)
        self.mine = True

    def give_back(self) -> None:
        fcntl.flock(self.held, fcntl.LOCK_UN)
        self.mine = False


CORES = pytest.StashKey[Cores]()
GROUP = pytest.StashKey[str]()
SHARED = "HVDTRAIN_TESTS_SHARED"  # a folder
GROUPS = "groups.json"  # in it: the group of each test


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole groups. pytest-xdist's own groups do not work with pytest 9.2, which keeps node ids."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        @functools.cached_property
        def groups(self) -> dict[str, str]:
            found: dict[str, str] = json.loads((Path(os.environ[SHARED]) / GROUPS).read_text())
            return found

        def _split_scope(self, nodeid: str) -> str:
            return self.groups[nodeid]

    return GroupScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """Make a folder for the locks that pytest-xdist's processes share, which inherit this environment."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        config.stash[CORES] = Cores(Path(os.environ[SHARED]))
    else:
        folder = tempfile.mkdtemp(prefix="hvdtrain-tests-")
        os.environ[SHARED] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder))
