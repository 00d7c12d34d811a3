"""Goodput of an elastic run on slots that come and go as spot nodes do.

    python -m tests.benchmarks.elastic_goodput [--scale 2] [--json F] [--plot F.png]
        [--lost-every 60] [--run='--local-steps 16']

First the steady throughput of 1, 2, 3 and 4 ranks is measured, each in a run of its own; then a run goes through TRACE,
ten minutes of joins and leaves, --scale times faster: a join costs seconds of the real clock all the same. Goodput is
the number of examples that were trained in this time, each of which counts once, as the ledger has to say, over what
the slots there were could have done: the steady throughput of as many ranks, summed over time. With --lost-every N
three of four slots stay, and the fourth is lost every N seconds, in the midst of a step, and there again N / 4 later.
A pass sleeps (tests/ranks/slow_recipe.py), so that a step takes as long as its rank's part, however few the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from hvdtrain.ledger.verify import verify_ledger
from tests.benchmarks.elastic_log import METRICS
from tests.benchmarks.elastic_runs import NAMES, Fails, Hvdtrain, folder
from tests.benchmarks.tables import Table, publish
from tests.ranks.elastic import ElasticJob, verify
from tests.ranks.harness import rows

# Of 12 passes a step, a rank makes 12, 6, 4 or 3.
BATCH, MICRO, PAUSE = 96, 8, 0.05
SETTLING, STEADY = 5, 25  # steps before, and in which, steady throughput is measured
FIRST = (0, 1)  # slots at the beginning
# (second, slot, what): "leave" is a notice, the host is listed no more; "lost" likewise, and its worker is killed.
TRACE = (
    (20, 2, "join"),
    (55, 3, "join"),
    (95, 1, "leave"),
    (120, 3, "lost"),
    (150, 1, "join"),
    (175, 3, "join"),
    (210, 0, "leave"),
    (235, 2, "leave"),
    (260, 3, "lost"),
    (290, 0, "join"),
    (315, 2, "join"),
    (345, 3, "join"),
    (380, 1, "lost"),
    (405, 2, "leave"),
    (430, 1, "join"),
    (455, 2, "join"),
    (490, 0, "leave"),
    (520, 3, "lost"),
    (545, 0, "join"),
    (575, 3, "join"),
)
LENGTH = 600  # seconds
Event = tuple[float, int, str]
Trace = Sequence[Event]


class Slots(NamedTuple):
    """So many slots there were from this moment on."""

    at: float
    count: int


def lose_every(seconds: float) -> list[Event]:
    """A trace of ten minutes in which one slot after the other is lost, and comes back."""
    moments = [seconds * number for number in range(1, int(LENGTH // seconds))]
    lost = [(moment, number % 4, "lost") for number, moment in enumerate(moments)]
    return sorted([*lost, *((moment + seconds / 4, slot, "join") for moment, slot, _ in lost)])


@contextlib.contextmanager
def training(slots: tuple[int, ...], more: list[str]) -> Iterator[Hvdtrain]:
    with folder() as path:
        options = ["--batch-size", str(BATCH), "--micro-batch", str(MICRO), "--pause", str(PAUSE), "--epochs", "2000"]
        options += ["--schedule", "constant", "--lr", "0.01", "--eval-every", "1000000", "--checkpoint-every", "100"]
        with (
            ElasticJob(path, hosts_of(slots), *options, *more, launch=[]) as job,
            Hvdtrain(job, path, job.run_dir / METRICS) as run,
        ):
            run.settle(len(slots), SETTLING)
            yield run


def hosts_of(slots: tuple[int, ...]) -> str:
    return " ".join(f"{NAMES[slot]}:1" for slot in slots)


def steady(ranks: int, more: list[str]) -> float:
    """Examples per second."""
    with training(tuple(range(ranks)), more) as run:
        run.settle(ranks, SETTLING + STEADY)
        steps = run.steps()[SETTLING:]
        return BATCH * (len(steps) - 1) / (steps[-1].at - steps[0].at)


def replay(trace: Trace, first: tuple[int, ...], scale: float, more: list[str]) -> dict[str, Any]:
    """Go through a trace; what there was of slots, and what was done, by seconds from the beginning."""
    with training(first, more) as run:
        slots, began = set(first), time.monotonic()
        history = [Slots(0.0, len(slots))]
        for second, slot, what in trace:
            wait(run, began + second / scale)
            worker = worker_on(run, NAMES[slot]) if what == "lost" else None
            (slots.add if what == "join" else slots.remove)(slot)
            run.job.hosts(hosts_of(tuple(sorted(slots))))
            if worker is not None:
                worker.kill()
            history.append(Slots(time.monotonic() - began, len(slots)))
            print(
                f"  {history[-1].at:6.1f} s  {what:5} {NAMES[slot]:9} {len(slots)} slots", file=sys.stderr, flush=True
            )
        wait(run, began + LENGTH / scale)
        length = time.monotonic() - began
        seen, steps = list(run.watch.seen), run.steps()
        run.job.process.send_signal(signal.SIGINT)
        run.job.end(75, hurry=False)
        verify(run.job.run_dir)
        again = verify_ledger(run.job.run_dir).owed  # lost in rounds of local steps, and trained again
        losses = {row["step"]: row["loss"] for row in rows(run.job.run_dir)}
    done = [
        {"at": one.at - began, "step": one.row["step"], "size": step.size, "loss": losses[one.row["step"]]}
        for one, step in zip(seen, steps, strict=False)
    ]
    return {"length": length, "slots": history, "done": done, "again": again}


def wait(run: Hvdtrain, until: float) -> None:
    """Raises Fails where the run ends meanwhile: all slots that trained have left before those that came could join."""
    while time.monotonic() < until:
        if run.job.process.poll() is not None:
            raise Fails(
                f"the run ended with {run.job.process.returncode}; with a smaller --scale slots have time to join"
            )
        time.sleep(0.02)


def worker_on(run: Hvdtrain, host: str) -> psutil.Process | None:
    """The worker in a host's slot, if there is one by now."""
    for process in run.job.processes():
        with contextlib.suppress(psutil.Error):
            slot = json.loads(process.environ().get("HVDTRAIN_MEMBER", "{}")).get("slot")
            if slot and slot["host"] == host:
                return process
    return None


def possible(slots: list[Slots], length: float, rates: dict[int, float]) -> float:
    """How many examples the slots could have done."""
    ends = [*(one.at for one in slots[1:]), length]
    return sum(rates[one.count] * (end - one.at) for one, end in zip(slots, ends, strict=True))


def trained(found: dict[str, Any]) -> int:
    """How many examples were, in the time of the trace."""
    within = [one["step"] for one in found["done"] if 0 <= one["at"] <= found["length"]]
    return BATCH * (within[-1] - within[0]) - found["again"]


def plot(found: dict[str, Any], rates: dict[int, float], path: Path) -> None:
    """Slots and ranks, the loss, and examples per second, over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = [one for one in found["done"] if 0 <= one["at"] <= found["length"]]
    times = [one["at"] for one in done]
    ends = [one.at for one in found["slots"]] + [found["length"]]
    counts = [one.count for one in found["slots"]]
    figure, (ranks, loss, speed) = pyplot.subplots(3, 1, sharex=True, figsize=(10, 7), constrained_layout=True)
    ranks.stairs(counts, ends, color="lightgray", fill=True, label="slots there are")
    ranks.step(times, [one["size"] for one in done], where="post", label="ranks that train")
    ranks.set_ylabel("ranks")
    ranks.set_ylim(0, 4.5)
    ranks.legend(loc="lower right")
    loss.plot(times, [one["loss"] for one in done], linewidth=0.8)
    loss.set_ylabel("loss")
    speed.stairs([rates[count] for count in counts], ends, color="lightgray", fill=True, label="possible")
    width = 5  # steps
    pairs = [(a, b) for a, b in zip(done, done[width:], strict=False) if b["at"] > a["at"]]
    values = [BATCH * (b["step"] - a["step"]) / (b["at"] - a["at"]) for a, b in pairs]
    speed.plot([b["at"] for _, b in pairs], values, linewidth=0.8, label=f"trained, over {width} steps")
    speed.set_ylabel("samples/s")
    speed.set_xlabel("seconds")
    speed.legend(loc="lower right")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=2.0, help="how many times faster than the trace's ten minutes")
    parser.add_argument("--lost-every", type=float, help="seconds; instead of the trace of joins and leaves")
    parser.add_argument("--run", default="", help="options of the runs")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    parser.add_argument("--plot", type=Path, help="file for a plot")
    options = parser.parse_args()
    rates, more = {}, shlex.split(options.run)
    trace: Trace = TRACE
    first: tuple[int, ...] = FIRST
    if options.lost_every:
        trace, first = lose_every(options.lost_every), (0, 1, 2, 3)
    for ranks in range(1, 5) if not options.lost_every else (3, 4):
        rates[ranks] = steady(ranks, more)
        print(f"  {ranks} ranks  {rates[ranks]:7.1f} samples/s", file=sys.stderr, flush=True)
    found = replay(trace, first, options.scale, more)
    most, useful = possible(found["slots"], found["length"], rates), trained(found)
    worlds = sum(one["size"] != other["size"] for one, other in itertools.pairwise(found["done"]))
    if options.plot:
        plot(found, rates, options.plot)
    caption = f"{len(trace)} joins and leaves in {found['length']:.0f} s, {worlds} changes of size, exactly once:"
    row = [f"{useful:,}", f"{most:,.0f}", f"{useful / most:.1%}"]
    publish(options.json, [Table(["examples trained", "possible at steady rates", "goodput"], [row], caption)])


if __name__ == "__main__":
    main()
