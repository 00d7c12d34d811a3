"""Loader processes: they live as long as the run, and change nothing of what is loaded."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hvdtrain.system.errors import RecipeError, RunError
from hvdtrain.torch.data import BatchDataset
from hvdtrain.torch.loader import BatchLoader
from tests.support.limits import stretch
from tests.unit.test_examples import Listed, Mine, draw

PARTS = [np.arange(start, start + 4) for start in range(0, 40, 4)]


OPEN: list[BatchLoader] = []


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    left = set(psutil.Process().children(recursive=True)) - before
    while OPEN:
        OPEN.pop().close()
    assert left == set()


def open_loader(example: Any, workers: int) -> BatchLoader:
    OPEN.append(BatchLoader(BatchDataset(Mine(), "train", Listed(example)), workers))
    return OPEN[-1]


def values(loader: BatchLoader, epoch: int = 0, parts: Any = PARTS) -> list[list[Any]]:
    return [batch.tolist() for _, batch in loader.load_batches(parts, [0, epoch])]


def test_batches_do_not_depend_on_the_processes() -> None:
    found = []
    for workers in (0, 1, 2):
        loader = open_loader(lambda i: torch.tensor([i, *draw()]), workers)
        found.append([values(loader, epoch) for epoch in (0, 1)])
        loader.close()
    assert found[1:] == found[:1] * 2
    assert found[0][0] != found[0][1]
    assert [row[0] for batch in found[0][0] for row in batch] == list(range(40))


def test_processes_and_their_caches_live_from_epoch_to_epoch() -> None:
    loaded: dict[int, int] = {}

    def example(i: int) -> Any:
        loaded[i] = loaded.get(i, 0) + 1
        return torch.tensor([os.getpid(), loaded[i]])

    loader = open_loader(example, 2)
    epochs = [values(loader, epoch) for epoch in range(3)]
    pids = {row[0] for batches in epochs for batch in batches for row in batch}
    assert len(pids) == 2
    assert os.getpid() not in pids
    # The same parts go to the same processes in turn.
    assert [{row[1] for batch in batches for row in batch} for batches in epochs] == [{1}, {2}, {3}]
    loader.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    loader.close()


def test_parts_are_read_as_they_are_needed() -> None:
    taken = 0

    def endless() -> Iterator[Any]:
        nonlocal taken
        for start in itertools.count():
            taken += 1
            yield np.array([start % 40])

    for workers in (0, 2):
        taken = 0
        loader = open_loader(lambda i: i, workers)
        batches = loader.load_batches(endless(), [0])
        for _ in range(10):
            next(batches)
        assert taken <= 10 + 2 * workers
        # What was asked for and is not needed any more does not come up in the next epoch.
        assert values(loader) == [part.tolist() for part in PARTS]
        loader.close()


def test_errors_come_as_they_are_and_end_no_process() -> None:
    def example(i: int) -> Any:
        if i == 17:
            raise ValueError("image 17 is truncated")
        return None if i == 30 else i

    for workers in (0, 2):
        loader = open_loader(example, workers)
        with pytest.raises(RecipeError) as raised:
            values(loader)
        assert str(raised.value) == "Mine.dataset('train')[17] raised ValueError: image 17 is truncated"
        assert "in example" in raised.value.trace
        with pytest.raises(RunError, match=r"^Mine.dataset\('train'\)\[30\] is None; expected an example$"):
            values(loader, parts=[np.array([30])])
        assert values(loader, parts=PARTS[:2]) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        loader.close()


def test_a_process_that_is_killed_is_named_and_replaced(tmp_path: Path) -> None:
    once = tmp_path / "killed"

    def example(i: int) -> int:
        if i == 17 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    loader = open_loader(example, 2)
    with pytest.raises(RecipeError) as raised:
        values(loader)
    text = "a process that loads Mine.dataset('train') was killed by SIGKILL: is this host out of memory?"
    assert str(raised.value) == text
    assert values(loader) == [part.tolist() for part in PARTS]
    loader.close()


def test_a_process_that_is_stuck_holds_nobody_up() -> None:
    def example(i: int) -> int:
        time.sleep(1000 if i >= 8 else 0)
        return i

    loader = open_loader(example, 2)
    next(loader.load_batches(PARTS, [0]))
    pids = [process.pid for process in loader._worker_processes()]
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 30  # 2 s; torch alone takes 10 s for each of two
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_signals_of_a_job_are_the_ranks_to_heed() -> None:
    """A terminal, timeout(1) or a batch system signals all processes of a job."""
    loader = open_loader(lambda i: i, 2)
    loader.start_workers()
    for process in loader._worker_processes():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(process.pid, number)
    assert values(loader) == [part.tolist() for part in PARTS]
    loader.close()


def test_processes_end_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import time\n"
        "from tests.unit.test_loader import open_loader\n"
        "loader = open_loader(lambda i: time.sleep(1000), 2)\n"
        "loader.start_workers()\n"
        "print(*[process.pid for process in loader._worker_processes()], flush=True)\n"
        "time.sleep(1000)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        pids = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(pids) == 2
        rank.kill()
        deadline = time.monotonic() + stretch(20)
        while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_long_tmpdir_leaves_room_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 130)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = set(Path("/tmp").glob("pymp-*"))

    def example(i: int) -> Any:
        import tempfile

        assert tempfile.gettempdir() == str(long)  # a dataset's files stay where the user wants them
        return torch.full((2000,), i)

    loader = open_loader(example, 2)
    assert [batch[0][0] for batch in values(loader)] == [part[0] for part in PARTS]
    loader.close()
    assert set(Path("/tmp").glob("pymp-*")) - before == set()
    assert list(long.iterdir()) == []


def test_loading_in_this_process_leaves_no_trace_in_the_generators_of_a_seeded_step() -> None:
    """What a step draws is seeded after its batch has come, and so is what an evaluation draws."""
    from hvdtrain.torch.data import seed_all

    drawn = []
    for workers in (0, 2):
        loader = open_loader(lambda i: torch.tensor(draw()), workers)
        for _ in loader.load_batches(PARTS[:2], [0]):
            seed_all((0, 5))
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        loader.close()
    assert len(set(drawn)) == 1
