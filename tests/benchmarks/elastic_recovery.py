"""How long training stands still when a worker is killed, told to go or joins: hvdtrain, stock Horovod and torchrun.

    python -m tests.benchmarks.elastic_recovery [--rounds 3] [--ranks 4] [--ways hvdtrain,horovod,torchrun] [--json F]

The digits recipe on loopback, each rank a host of its own with one thread, every step PAUSE longer than it takes.
hvdtrain under bare horovodrun; horovod: its own elastic mode, a commit every step; torchrun: DDP, a checkpoint every
step, and for a worker that is killed one agent with all ranks, else an agent for each.

    kill      SIGKILL to a worker: from then to the end of the first step that the others make without it
    return    of this worker, started again
    SIGTERM   to the process that the launcher keeps in a slot: hvdtrain's supervisor, a stock worker, a torchrun agent
    unlisted  a host that the discovery script no longer lists
    join      a host more

All but the first: the longest time between two steps around the event, less the median step.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.elastic_runs import (
    NAMES,
    Fails,
    Found,
    horovod,
    hvdtrain,
    list_hosts,
    listed,
    torchrun,
    unlist,
)
from tests.benchmarks.tables import Table, publish

EVENTS = ("kill", "return", "SIGTERM", "unlisted", "join")
NEVER = 20.0  # seconds to wait for what is not expected
VICTIM = 1  # a rank


def attempt(found: Found, event: str, observe: Callable[[], Found]) -> None:
    """What happens, or how it fails."""
    try:
        found[event] = observe()
        said = f"{found[event]['still']:8.3f} s, {found[event]['after']:.3f} s after the event"
    except Fails as fails:
        found[event] = {"fails": str(fails)}
        said = str(fails)
    print(f"  {event:9} {said}", file=sys.stderr, flush=True)


def of_hvdtrain(ranks: int, found: Found) -> None:
    with hvdtrain(ranks) as run:
        attempt(found, "kill", lambda: run.observe(ranks - 1, run.worker(VICTIM).kill, dies=True))
        attempt(found, "return", lambda: run.observe(ranks, lambda: None))
        run.settle(ranks)
        supervisor = run.job.supervisor(VICTIM)
        attempt(found, "SIGTERM", lambda: run.observe(ranks - 1, supervisor.terminate))
        run.settle(ranks - 1)
        attempt(found, "join", lambda: run.observe(ranks, lambda: list_hosts(run.folder, listed(ranks + 1))))
        run.settle(ranks)
        attempt(found, "unlisted", lambda: run.observe(ranks - 1, lambda: unlist(run, VICTIM)))


def of_horovod(ranks: int, found: Found) -> None:
    """Each event in a run of its own."""
    with horovod(ranks, ranks) as run:
        attempt(found, "kill", lambda: run.observe(ranks - 1, run.worker(VICTIM).kill, dies=True))
        attempt(found, "return", lambda: run.observe(ranks, lambda: None, limit=NEVER))
    with horovod(ranks, ranks) as run:
        attempt(found, "SIGTERM", lambda: run.observe(ranks - 1, run.worker(VICTIM).terminate))
    with horovod(ranks, ranks) as run:
        attempt(found, "unlisted", lambda: run.observe(ranks - 1, lambda: unlist(run, VICTIM)))
    with horovod(ranks - 1, ranks) as run:
        attempt(found, "join", lambda: run.observe(ranks, lambda: list_hosts(run.folder, listed(ranks))))


def of_torchrun(ranks: int, found: Found) -> None:
    with torchrun(ranks, 1) as (run, _):
        attempt(found, "kill", lambda: run.observe(ranks, run.worker(VICTIM).kill, dies=True))
    with torchrun(ranks, ranks) as (run, start):
        first = run.job.process.pid  # keeps the list of all agents
        parents = [run.worker(rank).parent() for rank in range(ranks)]
        agent = next(p for p in parents if p is not None and p.pid != first)
        attempt(found, "SIGTERM", lambda: run.observe(ranks - 1, lambda: agent.send_signal(signal.SIGTERM)))
        if "fails" not in found["SIGTERM"]:
            run.settle(ranks - 1)
            attempt(found, "join", lambda: run.observe(ranks, start))


WAYS: dict[str, Callable[[int, Found], None]] = {
    "hvdtrain": of_hvdtrain,
    "horovod": of_horovod,
    "torchrun": of_torchrun,
}


def cell(found: list[Found]) -> str:
    """Median and spread; how it fails where it does."""
    fails = sorted({one["fails"].partition(":")[0] for one in found if "fails" in one})
    values = [one["still"] for one in found if "still" in one]
    text = [f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"] if values else []
    return ", ".join([*text, *fails]) or "-"


def tables(caption: str, results: dict[str, list[Found]]) -> list[Table]:
    """How long training stands still, and of what hvdtrain's time consists."""
    still = []
    for event in EVENTS:
        still.append([event, *(cell([turn[event] for turn in turns if event in turn]) for turns in results.values())])
    names = ("detect", "rendezvous", "sync", "recompute")
    parts = []
    for event in EVENTS:
        turns = [turn[event] for turn in results.get("hvdtrain", []) if "parts" in turn.get(event, {})]
        if turns:
            medians = [statistics.median(turn["parts"][name] for turn in turns) for name in names]
            after = statistics.median(turn["after"] for turn in turns)
            parts.append([event, *(f"{value:.3f}" for value in medians), f"{after:.2f}"])
    return [
        Table(["s, median (least-most)", *results], still, caption),
        Table(["hvdtrain, s, medians", *names, "from the event on"], parts),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=4, choices=range(2, len(NAMES)))
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    if strange := set(options.ways) - set(WAYS):
        parser.error(f"--ways: {', '.join(strange)} is none of {', '.join(WAYS)}")
    results: dict[str, list[Found]] = {way: [] for way in options.ways}
    for turn in range(options.rounds):
        for way in options.ways:
            print(f"round {turn + 1}  {way}", file=sys.stderr, flush=True)
            results[way].append({})
            try:
                WAYS[way](options.ranks, results[way][-1])
            except Fails as fails:
                print(f"  between two events: {fails}", file=sys.stderr, flush=True)
    caption = f"{options.ranks} ranks on {os.cpu_count()} cores, loopback; {options.rounds} rounds"
    publish(options.json, tables(caption, results))
    turns = [(way, turn) for way, found in results.items() for turn in found]
    fails = {f"{way}, {event}: {one['fails']}" for way, turn in turns for event, one in turn.items() if "fails" in one}
    print("", *sorted(fails), sep="\n")


if __name__ == "__main__":
    main()
