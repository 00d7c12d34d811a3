"""Gloo's exchanges use a link in both directions at once, as its all-reduce does."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.start import by_horovodrun, told
from tests.hosts.cluster import cluster

pytestmark = [pytest.mark.usefixtures("machine_allows_clusters"), pytest.mark.alone]

RATE, SIZE = 100e6 / 8, 2_000_000  # bytes a second of the link; bytes that each rank sends

RANK = f"""
import json, time, hvdtrain, torch
from hvdtrain.comm import collectives
world = hvdtrain.init()
x = torch.zeros({SIZE}, dtype=torch.uint8)
ways = {{
    "all-to-all": lambda: collectives.all_to_all_async(torch.zeros(2 * {SIZE}, dtype=torch.uint8), "parts"),
    "all-gather": lambda: collectives.all_gather_async(x, "sums"),
    "all-reduce": lambda: collectives.all_reduce_async_(x.view(torch.float32), "sum"),
}}
took = {{}}
for name, way in ways.items():
    for _ in range(3):
        begin = time.perf_counter()
        collectives.wait(way())
        took[name] = time.perf_counter() - begin
if world.rank == 0:
    print("TOOK" + json.dumps(took), flush=True)
"""


def test_both_directions_at_once() -> None:
    """One after the other they take the link's time twice; the link is what these hosts wait for."""
    with cluster(2, "100mbit") as hosts:
        said = by_horovodrun([sys.executable, "-c", RANK], 2, hosts, {}, 60)
    took = told(said, "TOOK")
    for way, seconds in took.items():
        assert 0.8 * SIZE / RATE < seconds < 1.6 * SIZE / RATE, (way, took)
