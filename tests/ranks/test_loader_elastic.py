"""Loader processes in an elastic run: they outlive its worlds, and end with their rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.ranks.elastic import RECIPE, ElasticJob, losses, verify
from tests.support.worlds import KeptWorld, train


@pytest.mark.slow
def test_loader_processes_live_from_world_to_world(tmp_path: Path, world1: KeptWorld) -> None:
    train(world1, RECIPE, tmp_path / "reference", "--pause", "0", "--log-every", "1", "--threads", "1", "--epochs", "4")
    options = ("--pause", "0.3", "--workers", "1", "--epochs", "4")
    with ElasticJob(tmp_path, "localhost:2", *options) as job:
        job.step(5)
        survivor = job.worker(0)
        before = {child.pid for child in survivor.children()}
        lost = job.worker(1).children()
        assert len(before) == len(lost) == 2  # one for each split
        job.kill(1)
        job.world(1)
        psutil.wait_procs(lost, timeout=20)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in lost)
        job.world(2)
        job.more(2)
        assert {child.pid for child in survivor.children()} == before
        job.end()
    np.testing.assert_allclose(losses(job.run_dir), losses(tmp_path / "reference"), rtol=1e-4)
    verify(job.run_dir)
