"""`hvdtrain.diagnose` in programs of several ranks: DDP, FSDP and Horovod; and programs that end as they should not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hvdtrain
from hvdtrain.comm.collectives import broadcast_json
from tests.ranks.harness import ROOT
from tests.support.limits import stretch
from tests.support.worlds import on_ranks

STEPS, PLANTED, WIDTH = 14, 0.25, 32


class Blocks(nn.Module):
    """Two layers, of which one can be slow in backward; the batch norm has buffers that DDP broadcasts."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4)
        self.pause = pause

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(batch))
        if self.pause:
            hidden.register_hook(lambda _: time.sleep(self.pause))
        return self.last(hidden)  # type: ignore[no-any-return]


@contextlib.contextmanager
def gloo(folder: Path) -> Iterator[None]:
    """torch.distributed over the ranks of a kept world."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=hvd.rank(), world_size=hvd.size())
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(model: nn.Module, optimizer: Any, path: Path, pause: float = 0.0, drift_at: int = 0) -> dict[str, Any]:
    """Train with a wait of `pause` for each batch; return diagnose.json on rank 0."""

    def generate() -> Iterator[torch.Tensor]:
        for _ in range(STEPS):
            time.sleep(pause)
            yield torch.randn(8, WIDTH)

    with hvdtrain.diagnose(model, optimizer, path=path) as diagnosis:
        for step, batch in enumerate(diagnosis.time_batches(generate())):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            if step + 1 == drift_at:
                with torch.no_grad():
                    next(iter(model.parameters())).add_(1)
    found: dict[str, Any] = json.loads(path.read_text()) if hvd.rank() == 0 else {}
    return found


def check(found: dict[str, Any], rank: int, cause: str) -> None:
    """On rank 0: this rank is named at the end."""
    if hvd.rank() == 0:
        named = found["end"]["straggler"]
        assert named is not None and (named["rank"], named["cause"]) == (rank, cause), found["end"]
        assert named["longer"] > PLANTED / 2 and found["end"]["steps"] == STEPS - 1


@pytest.mark.alone
@on_ranks(3)
def test_ddp(tmp_path: Path) -> None:
    """A rank that is slow in backward, or waits for its batches; and no parameters that differ."""
    rank = broadcast_json(random.randrange(3), "drawn")
    with gloo(tmp_path):
        slow = PLANTED * (dist.get_rank() == rank)
        model = DistributedDataParallel(Blocks(slow))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        found = train(model, optimizer, tmp_path / "backward.json")
        check(found, rank, "compute")
        assert found.get("drift") is None
        model = DistributedDataParallel(Blocks())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        check(train(model, optimizer, tmp_path / "loader.json", slow), rank, "data")


@on_ranks(3)
def test_drift_is_named_and_ends_nothing(tmp_path: Path) -> None:
    with gloo(tmp_path):
        model = DistributedDataParallel(Blocks())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        found = train(model, optimizer, tmp_path / "diagnose.json", drift_at=4 if dist.get_rank() == 1 else 0)
        if dist.get_rank() == 0:
            drift = found["drift"]
            assert (drift["step"], drift["tensor"]) == (10, "module.first.weight")
            assert [row["rank"] for row in drift["ranks"]] == [1]


@pytest.mark.alone
@on_ranks(2)
def test_fsdp(tmp_path: Path) -> None:
    """Shards that differ are not reported as drift."""
    rank = broadcast_json(random.randrange(2), "drawn")
    with gloo(tmp_path):
        model = Blocks(PLANTED * (dist.get_rank() == rank))
        fully_shard(model.first)
        fully_shard(model)
        found = train(model, torch.optim.SGD(model.parameters(), lr=0.01), tmp_path / "diagnose.json")
        check(found, rank, "compute")
        assert found.get("drift") is None


@pytest.mark.alone
@on_ranks(3)
def test_horovod(tmp_path: Path) -> None:
    """Horovod's own optimizer, and no torch.distributed: rank 0 serves the messages."""
    rank = broadcast_json(random.randrange(3), "drawn")
    model = Blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters())
    found = train(model, optimizer, tmp_path / "diagnose.json", PLANTED * (hvd.rank() == rank))
    check(found, rank, "data")


PROGRAM = """
import sys, time, torch, torch.distributed as dist
import hvdtrain
dist.init_process_group("gloo")
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def train(steps):
    for _ in range(steps):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        time.sleep(0.01)
rank = dist.get_rank()
with hvdtrain.diagnose(model, optimizer, path=sys.argv[1] + "/uneven.json"):
    train(20 + 40 * rank)
dist.barrier()
try:
    with hvdtrain.diagnose(model, optimizer, path=sys.argv[1] + "/raised.json"):
        train(20)
        if rank == 1:
            raise ZeroDivisionError
except ZeroDivisionError:
    print("raised")
with hvdtrain.diagnose(model, optimizer, path=sys.argv[1] + "/left.json"):
    train(20)
    if rank == 1:
        import os
        os._exit(3)
print("end")
"""


def test_ranks_of_uneven_lengths_that_raise_or_die_keep_nobody_waiting(tmp_path: Path) -> None:
    """No collective is in a program's way: it ends, and rank 0 reports what it knows."""
    port = str(random.randrange(20000, 30000))
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=stretch(90)) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 3], outputs
    assert "raised" in outputs[1][0] and outputs[0][0].endswith("end\n")
    uneven = json.loads((tmp_path / "uneven.json").read_text())
    assert uneven["end"]["steps"] == 19 and len(uneven["hosts"]) == 2
    assert outputs[0][0].count("the end is without rank 1, which did not report it in time") <= 2
