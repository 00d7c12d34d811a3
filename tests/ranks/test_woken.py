"""Horovod's background thread is woken by what is handed to it; otherwise it sleeps."""

from __future__ import annotations

import sys

import pytest

from tests.ranks.harness import run
from tests.support.slow_cases import slow

SUMS = 20
CYCLE = 1.0  # seconds; if nobody were woken, each sum would take one or more
SCRIPT = f"""
import time, torch, hvdtrain
from hvdtrain.comm import collectives
world = hvdtrain.init()
begin = time.perf_counter()
for i in range({SUMS}):
    total = collectives.wait(collectives.all_reduce_async_(torch.full((3,), float(world.rank + i)), f"woken.{{i % 2}}"))
    assert total.tolist() == [sum(range(world.size)) + world.size * i] * 3, total
print("took", time.perf_counter() - begin, flush=True)
"""

IDLE = """
import resource, time, hvdtrain
hvdtrain.init()
time.sleep(0.2)
begin = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
time.sleep(2)
print("switched", (resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - begin) / 2, flush=True)
"""


def told(script: str, ranks: int, mark: str, env: dict[str, str] | None = None) -> list[float]:
    """Run a script on so many ranks; the number that each has printed behind the mark."""
    done = run("horovodrun", ranks, [sys.executable, "-c", script], env=env)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    numbers = [float(line.split(mark)[1]) for line in output.splitlines() if mark in line]
    assert len(numbers) == ranks, output
    return numbers


@pytest.mark.parametrize("ranks", [*slow(2), 3])
def test_sums_do_not_wait_for_a_cycle(ranks: int) -> None:
    seconds = told(SCRIPT, ranks, "took", {"HOROVOD_CYCLE_TIME": str(CYCLE * 1000)})
    assert max(seconds) < SUMS * CYCLE / 4, seconds


def test_an_idle_rank_sleeps() -> None:
    """All its threads together wake some 200 times a second; five times as often when it asks every 5 ms."""
    rates = told(IDLE, 2, "switched")
    assert max(rates) < 500, rates
