"""The bytes that hvdtrain counts are those that the kernel carries between hosts."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.start import by_horovodrun, told
from tests.hosts.cluster import cluster
from tests.support.slow_cases import slow

pytestmark = [pytest.mark.usefixtures("machine_allows_clusters"), pytest.mark.alone]

STEPS = 10
SPECS = ["none", "int8", "powersgd:4", "topk:0.01"]
HEADERS = 1.10  # TCP's and IP's, and acknowledgements
# Horovod's threads talk at this interval, also when there is nothing to do; bytes of one such talk.
CYCLE_MS, CYCLE_BYTES = 10, 2000
# Agreeing on a step's collectives, each bucket's and the flags', with each rank.
STEP_BYTES = 5000


def test_a_host_sends_its_sum_once_instead_of_each_ranks_gradients() -> None:
    """2 hosts x 2 ranks, bytes out of a host by the kernel's counters; and as many as are counted.

    Flat, two ranks send half of a payload, and the ring of the all-gather leaves the host once, with three parts of
    four: 1.75 payloads. With the sum of the host, half of a payload in each round.
    """
    specs = ["int8", "int8@host"]
    with cluster(2) as hosts:
        rank = [sys.executable, "-m", "tests.ranks.wire_rank", "small", *specs]
        rank += ["--steps", str(STEPS), "--interface", "eth0"]
        said = by_horovodrun(rank, 4, hosts, {"HOROVOD_CYCLE_TIME": str(CYCLE_MS)}, 90)
    seen = told(said, "WIRE")
    for first in (0, 2):  # of each host
        ranks = seen[first : first + 2]
        flat, summed = (ranks[0][spec]["sent"] for spec in specs)
        assert 1.65 < flat / summed < 1.85
        counted = sum(rank["int8@host"]["counted"] for rank in ranks)
        assert (
            counted
            <= summed
            <= HEADERS * counted
            + 2 * STEP_BYTES * STEPS * 4
            + CYCLE_BYTES * 100 * sum(rank["int8@host"]["seconds"] for rank in ranks)
        )


@pytest.mark.parametrize("number", [2, *slow(3)])
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
