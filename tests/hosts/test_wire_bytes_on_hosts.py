"""The bytes that hvdtrain counts are those that the kernel carries between hosts."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.start import by_horovodrun, told
from tests.hosts.cluster import cluster

pytestmark = [pytest.mark.usefixtures("machine_allows_clusters"), pytest.mark.alone]

STEPS = 10
SPECS = ["none", "int8", "powersgd:4", "topk:0.01"]
HEADERS = 1.10  # TCP's and IP's, and acknowledgements
# Horovod's threads talk at this interval, also when there is nothing to do; bytes of one such talk.
CYCLE_MS, CYCLE_BYTES = 10, 2000
# Agreeing on a step's collectives, each bucket's and the flags', with each rank.
STEP_BYTES = 5000


@pytest.mark.parametrize("number", [2, 3])
def test_what_is_counted_is_what_the_kernel_carries(number: int) -> None:
    with cluster(number) as hosts:
        rank = [sys.executable, "-m", "tests.ranks.wire_rank", "small", *SPECS]
        rank += ["--steps", str(STEPS), "--interface", "eth0"]
        said = by_horovodrun(rank, number, hosts, {"HOROVOD_CYCLE_TIME": str(CYCLE_MS)}, 90)
    seen = told(said, "WIRE")
    assert len(seen) == number
    for host, table in enumerate(seen):
        for spec, row in table.items():
            agreeing = STEP_BYTES * number * STEPS
            talk = agreeing + CYCLE_BYTES * row["seconds"] * 1000 / CYCLE_MS
            for way in ("sent", "received"):
                assert row["counted"] <= row[way] <= HEADERS * row["counted"] + talk, (host, spec, way, row, talk)
            # Otherwise nothing would be told; powersgd sends 42 kB a step.
            assert spec == "powersgd:4" or agreeing < 0.1 * row["counted"], (spec, row)
