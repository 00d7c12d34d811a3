"""Step times: without an exchange, with Horovod's own, and with hvdtrain's buckets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.bench.workload import (
    WARM_UP_STEPS,
    Workload,
    copy_model,
    describe_world,
    make_distributed_optimizer,
    prepare_workload,
    print_on_root,
    slowest_rank_medians,
    time_step,
)
from hvdtrain.comm import collectives
from hvdtrain.comm.world import HOROVOD_FUSION_BYTES, World, init, shut_down_horovod
from hvdtrain.recipe.base import Recipe
from hvdtrain.system.files import write_json
from hvdtrain.training.options import RunOptions

NO_EXCHANGE, STOCK_HOROVOD = "no exchange", "horovod"


def benchmark_step(
    world: World, recipe: Recipe, options: RunOptions, specs: Sequence[str], steps: int, json_path: Path | None
) -> None:
    """Print a row for each way of exchange, and write the rows as JSON if there is a path."""
    work = prepare_workload(recipe, options, world)
    title = f"{type(recipe).__name__}, {describe_world(world, work.device)}; medians of {steps} steps"
    print_on_root(world, f"# {title}")
    print_on_root(world, "way                      step ms  waited ms    sent MB   x horovod")
    rows: list[dict[str, Any]] = []
    for way in (STOCK_HOROVOD, NO_EXCHANGE, *specs):
        with use_stock_horovod() if way == STOCK_HOROVOD else contextlib.nullcontext():
            seconds, waited, sent = measure_exchange(work, way, steps)
        # Some methods send other sizes in turns.
        row: dict[str, Any] = {
            "way": way,
            "step_seconds": seconds,
            "waited_seconds": waited,
            "wire_bytes": sum(sent[-2:]) / 2,
        }
        row["gain"] = (rows or [row])[0]["step_seconds"] / seconds
        rows.append(row)
        print_on_root(
            world,
            f"{way:22}  {seconds * 1e3:8.1f}  {waited * 1e3:9.1f}  {row['wire_bytes'] / 1e6:9.3f}  {row['gain']:10.2f}",
        )
    if json_path is not None and world.rank == 0:
        write_json(json_path, {"title": title, "ranks": world.size, "rows": rows})


def measure_exchange(work: Workload, way: str, steps: int) -> tuple[float, float, list[int]]:
    """Median seconds of a step and seconds waited, the slowest rank's; and the bytes that this rank sent each step."""
    model = copy_model(work)
    optimizer: Any
    if way == NO_EXCHANGE:
        optimizer = work.recipe.optimizer(model.parameters())
    elif way == STOCK_HOROVOD:
        optimizer = make_distributed_optimizer(work, model, exchange="horovod")
    else:
        optimizer = make_distributed_optimizer(work, model, f"{way},warmup=0")
    collectives.barrier("bench.step")
    taken, sent = [], []
    for _ in range(WARM_UP_STEPS + steps):
        taken.append(time_step(work, model, optimizer))
        sent.append(getattr(optimizer, "wire_bytes", 0))
    seconds, waited, _ = slowest_rank_medians("bench.step.medians", taken[WARM_UP_STEPS:])
    return seconds, waited, sent


@contextlib.contextmanager
def use_stock_horovod() -> Iterator[None]:
    """Horovod as it comes: with its fusion buffer, which hvdtrain has no use for, and which is set when it starts."""
    before = os.environ["HOROVOD_FUSION_THRESHOLD"]
    restart_horovod(str(HOROVOD_FUSION_BYTES))
    yield
    restart_horovod(before)


def restart_horovod(threshold: str) -> None:
    """Start Horovod anew, on all ranks, with another size of its fusion buffer in bytes."""
    shut_down_horovod()
    os.environ["HOROVOD_FUSION_THRESHOLD"] = threshold
    init()
