"""Step times: without an exchange, with Horovod's own, and with hvdtrain's buckets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from hvdtrain.bench.workload import (
    WARM_UP_STEPS,
    BenchmarkPlan,
    Workload,
    copy_model,
    describe_world,
    make_distributed_optimizer,
    make_optimizer,
    prepare_workload,
    print_on_root,
    slowest_rank_medians,
    time_step,
)
from hvdtrain.comm import collectives
from hvdtrain.comm.world import HOROVOD_FUSION_BYTES, World, restart_horovod
from hvdtrain.system.files import write_json

NO_EXCHANGE, STOCK_HOROVOD = "no exchange", "horovod"


@dataclass(frozen=True)
class StepRow:
    """What was measured of one way to exchange gradients; its fields are keys of the JSON file.

    Attributes:
        way: NO_EXCHANGE, STOCK_HOROVOD, or a method of compression in hvdtrain's buckets.
        step_seconds: median of the slowest rank.
        waited_seconds: likewise, of the time in which a step's thread waited for communication.
        wire_bytes: sent by this rank in a step.
        gain: step time of STOCK_HOROVOD over this one's.
    """

    way: str
    step_seconds: float
    waited_seconds: float
    wire_bytes: float
    gain: float = 1.0

    def format_row(self) -> str:
        """Return the row as text."""
        return (
            f"{self.way:22}  {self.step_seconds * 1e3:8.1f}  {self.waited_seconds * 1e3:9.1f}  "
            f"{self.wire_bytes / 1e6:9.3f}  {self.gain:10.2f}"
        )


def benchmark_step(world: World, plan: BenchmarkPlan) -> None:
    """Print a row for each way of exchange, and write the rows as JSON if there is a path."""
    work = prepare_workload(plan, world)
    title = f"{type(plan.recipe).__name__}, {describe_world(world, work.device)}; medians of {plan.steps} steps"
    print_on_root(world, f"# {title}")
    print_on_root(world, "way                      step ms  waited ms    sent MB   x horovod")
    rows: list[StepRow] = []
    for way in (STOCK_HOROVOD, NO_EXCHANGE, *plan.specs):
        with use_stock_horovod() if way == STOCK_HOROVOD else contextlib.nullcontext():
            row = measure_exchange(work, way, plan.steps)
        if rows:
            row = replace(row, gain=rows[0].step_seconds / row.step_seconds)
        rows.append(row)
        print_on_root(world, row.format_row())
    if plan.json_path is not None and world.rank == 0:
        write_json(plan.json_path, {"title": title, "ranks": world.size, "rows": [asdict(row) for row in rows]})


def measure_exchange(work: Workload, way: str, steps: int) -> StepRow:
    """Train for some steps with one way of exchange and return its row."""
    model = copy_model(work)
    optimizer: Any
    if way == NO_EXCHANGE:
        optimizer = make_optimizer(work, model)
    elif way == STOCK_HOROVOD:
        optimizer = make_distributed_optimizer(work, model, exchange="horovod")
    else:
        optimizer = make_distributed_optimizer(work, model, f"{way},warmup=0")
    collectives.barrier("bench.step")
    timings, sent = [], []
    for _ in range(WARM_UP_STEPS + steps):
        timings.append(time_step(work, model, optimizer))
        sent.append(getattr(optimizer, "wire_bytes", 0))
    seconds, waited, _ = slowest_rank_medians("bench.step.medians", timings[WARM_UP_STEPS:])
    # Some methods send one of two sizes in turns.
    return StepRow(way, seconds, waited, sum(sent[-2:]) / 2)


@contextlib.contextmanager
def use_stock_horovod() -> Iterator[None]:
    """Run Horovod with its fusion buffer, which is set when it starts, and which hvdtrain does not use."""
    before = os.environ["HOROVOD_FUSION_THRESHOLD"]
    restart_horovod(HOROVOD_FUSION_BYTES)
    yield
    restart_horovod(int(before))
