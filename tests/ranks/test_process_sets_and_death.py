"""With process sets, a rank that dies ends no other one: they learn of it, and can leave (horovod#4021, #3501)."""

from __future__ import annotations

import re
import sys

import pytest

from tests.ranks.harness import run
from tests.support.slow_cases import slow

SURVIVOR = """
import os, signal, sys, time
import horovod.torch as hvd
import torch

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which horovodrun ends the others
hvd.init(process_sets=[hvd.ProcessSet(ranks) for ranks in eval(sys.argv[1])])
rank = hvd.rank()
try:
    for step in range(10**6):
        hvd.allreduce(torch.ones(4), op=hvd.Sum, name="sum")
        if step == 20 and rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
except Exception:
    print(f"rank {rank} has lost a peer", flush=True)
begin = time.monotonic()
hvd.shutdown()
print(f"rank {rank} has left in {time.monotonic() - begin:.1f} s", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("sets", [*slow("[[0, 1]]"), "[[0, 1], [0, 2], [1, 2]]"], ids=["one", "several"])
def test_a_rank_that_dies_aborts_no_other(sets: str) -> None:
    done = run("horovodrun", 3, [sys.executable, "-c", SURVIVOR, sets])
    for rank in (0, 1):
        assert f"rank {rank} has lost a peer" in done.stdout, f"{done.stdout}\n{done.stderr}"
        (left,) = re.findall(rf"rank {rank} has left in ([\d.]+) s", done.stdout)
        assert float(left) < 10
    assert "terminate called" not in done.stderr
