#!/usr/bin/env python3
"""Print `host:slots` for the nodes of a Slurm job, or of the running tasks of all jobs of one name.

    slurm.py [--job ID | --name NAME [--user USER]] [--slots N] [--limit 5]

With --name, a job array (or several jobs) of small preemptible tasks is one pool of nodes that grows and shrinks as
Slurm starts and preempts its tasks. Without --job and --name, the nodes of the job that this runs in, from its
environment alone. Slots are --slots, or the GPUs allocated per node, or the tasks per node.

Nodes with a notice leave by `hvdtrain agent --source slurm` and membership.py; this script sees only that a task ended.

Standard library only, Python 3.10 or later.
"""

from __future__ import annotations

import argparse
import getpass
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping

# Name and width of what squeue is asked for: columns of a fixed width, for not every version can separate them.
COLUMNS = (("JobID", 32), ("NumTasks", 16), ("tres-alloc", 1024), ("NodeList", 16384))
MOST_NODES = 100_000


class Trouble(Exception):
    """Shown as one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Print host:slots for the nodes of running Slurm jobs.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--job", help="the number of a job, or of a job array")
    which.add_argument("--name", help="the name of jobs")
    parser.add_argument("--user", help="whose jobs, with --name; default: one's own")
    parser.add_argument("--slots", type=positive, help="ranks of each node")
    parser.add_argument("--limit", type=float, default=5, help="seconds that squeue may take")
    options = parser.parse_args()
    try:
        if options.job or options.name:
            slots = slots_of_jobs(ask_squeue(options), options.slots)
        else:
            slots = slots_of_this_job(os.environ, options.slots)
    except (OSError, Trouble) as error:
        print(f"slurm.py: {error}", file=sys.stderr)
        return 1
    sys.stdout.write("".join(f"{host}:{slots[host]}\n" for host in sorted(slots)))
    return 0


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def ask_squeue(options: argparse.Namespace) -> str:
    """A line for each running task. Raises Trouble or OSError."""
    line = ["squeue", "--noheader", "--array", "--states=RUNNING"]
    line.append("--Format=" + ",".join(f"{name}:{width}" for name, width in COLUMNS))
    if options.job:
        line.append(f"--jobs={options.job}")
    else:
        line += [f"--name={options.name}", f"--user={options.user or getpass.getuser()}"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=options.limit, check=False)
    except subprocess.TimeoutExpired:
        raise Trouble(f"squeue has not answered within {options.limit:g} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Trouble(f"squeue: {said[-1] if said else f'exit {done.returncode}'}")
    return done.stdout


def slots_of_jobs(table: str, slots: int | None) -> Counter[str]:
    """The slots of each node; a node on which two tasks run has those of both. Raises Trouble."""
    found: Counter[str] = Counter()
    for line in table.splitlines():
        cells, begin = [], 0
        for _, width in COLUMNS:
            cells.append(line[begin : begin + width].strip())
            begin += width
        if any(len(cell) >= width for cell, (_, width) in zip(cells, COLUMNS, strict=True)):
            raise Trouble(f"squeue: a column is full: {line[:60].strip()} ...")
        job, tasks, tres, names = cells
        if not names:
            continue  # it has ended since
        hosts = expand(names)
        each = slots or slots_per_node(job, len(hosts), tasks, tres)
        for host in hosts:
            found[host] += each
    return found


def slots_per_node(job: str, nodes: int, tasks: str, tres: str) -> int:
    """GPUs per node, or else tasks per node. Raises Trouble if that is not the same for each node."""
    amounts = dict(item.partition("=")[::2] for item in tres.split(",") if "=" in item)
    gpus = amounts.get("gres/gpu") or sum(
        int(amount) for name, amount in amounts.items() if name.startswith("gres/gpu:") and amount.isdigit()
    )
    total = int(gpus) if str(gpus).isdigit() and int(gpus) else int(tasks) if tasks.isdigit() else 0
    if total < nodes or total % nodes:
        raise Trouble(f"job {job}: {total} GPUs or tasks on {nodes} nodes; give --slots")
    return total // nodes


def slots_of_this_job(environ: Mapping[str, str], slots: int | None) -> Counter[str]:
    """The slots of the nodes that this job was given. Raises Trouble."""
    names = environ.get("SLURM_JOB_NODELIST")
    if not names:
        raise Trouble("not within a Slurm job (SLURM_JOB_NODELIST is not set); give --job or --name")
    hosts = expand(names)
    if slots:
        return Counter(dict.fromkeys(hosts, slots))
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and int(gpus):
        return Counter(dict.fromkeys(hosts, int(gpus)))
    # One number for each node, those alike next to each other as 4(x3).
    counts: list[int] = []
    for item in environ.get("SLURM_TASKS_PER_NODE", "1").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if not match:
            raise Trouble(f"SLURM_TASKS_PER_NODE={environ['SLURM_TASKS_PER_NODE']} is not understood; give --slots")
        counts += [int(match[1])] * int(match[2] or 1)
    if len(counts) == 1:
        counts *= len(hosts)
    if len(counts) != len(hosts):
        raise Trouble(f"{len(hosts)} nodes, but SLURM_TASKS_PER_NODE is of {len(counts)}; give --slots")
    return Counter(dict(zip(hosts, counts, strict=True)))


def expand(text: str) -> list[str]:
    """The names of a list such as `a,node[01-03,7],rack[0-1]n[2-3]`. Raises Trouble."""
    if not re.fullmatch(r"(?:[^\[\]]|\[[^\[\]]*\])+", text):
        raise Trouble(f"{text!r} is not a list of nodes")
    names: list[str] = []
    # Commas within brackets belong to a name.
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        made = [""]
        for part in re.findall(r"\[[^\]]*\]|[^\[]+", item):
            ends = numbers(part[1:-1], text) if part.startswith("[") else [part]
            if len(made) * len(ends) > MOST_NODES:
                raise Trouble(f"too many nodes in {text!r}")
            made = [name + end for name in made for end in ends]
        names += made
    if not names or not all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) for name in names):
        raise Trouble(f"{text!r} is not a list of nodes")
    return names


def numbers(text: str, whole: str) -> list[str]:
    """The numbers of `01-03,7`, as wide as they are written. Raises Trouble."""
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item, re.ASCII)
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(MOST_NODES):
            raise Trouble(f"{whole!r} is not a list of nodes")
        found += [str(number).zfill(len(match[1])) for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found


if __name__ == "__main__":
    sys.exit(main())
