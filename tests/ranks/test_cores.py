"""Ranks keep to their own cores, unless somebody else has chosen some."""

from __future__ import annotations

import json
import os
import sys

import pytest

from hvdtrain.system import cpus
from tests.ranks.harness import launcher, run, skip_or_fail

ASK = """
import json, os, sys, threading, hvdtrain
world = hvdtrain.init()
seen = []
thread = threading.Thread(target=lambda: seen.append(sorted(os.sched_getaffinity(0))))
thread.start(), thread.join()
assert seen == [sorted(os.sched_getaffinity(0))]
print(f"CORES{json.dumps(seen[0])}", flush=True)
"""


def asked(kind: str, ranks: int, *before: str) -> list[set[int]]:
    """The cores of each rank, in no order."""
    done = run("alone", 1, [*before, *launcher(kind, ranks), sys.executable, "-c", ASK])
    assert done.returncode == 0, done.stdout + done.stderr
    found = [set(json.loads(part.partition("]")[0] + "]")) for part in done.stdout.split("CORES")[1:]]
    assert len(found) == ranks, done.stdout
    return found


def test_ranks_share_the_cores() -> None:
    if len(cpus.USABLE_CPUS) < 2 or len(cpus.USABLE_CPUS) != os.cpu_count() or cpus.GPU_DRIVER_FILE.exists():
        skip_or_fail("ranks are bound where there are two cores, all of them usable, and no GPU")
    first, second = asked("horovodrun", 2)
    assert first and second and first | second == cpus.USABLE_CPUS and not first & second


@pytest.mark.slow
def test_ranks_are_not_bound_if_alone_over_mpi_too_many_or_bound_already() -> None:
    """One rank has all cores; more ranks than cores are not bound; nor is MPI, or who was told a core to be on."""
    assert asked("mpirun", 2) == [cpus.USABLE_CPUS] * 2
    assert asked("alone", 1) == [cpus.USABLE_CPUS]
    assert asked("horovodrun", len(cpus.USABLE_CPUS) + 1) == [cpus.USABLE_CPUS] * (len(cpus.USABLE_CPUS) + 1)
    if len(cpus.USABLE_CPUS) > 1:
        one = min(cpus.USABLE_CPUS)
        assert asked("horovodrun", 2, "taskset", "-c", str(one)) == [{one}] * 2
