"""The nodes of a Slurm job, or of the running tasks of all jobs of one name.

By name, a job array (or several jobs) of small preemptible tasks is one pool of nodes that grows and shrinks as Slurm
starts and preempts its tasks.
"""

from __future__ import annotations

import getpass
from collections import Counter
from collections.abc import Mapping

from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.nodelist import parse_node_list, parse_repeated_counts
from hvdtrain.system.processes import ProcessTimeout, run_process

# Name and width of what squeue is asked for: columns of a fixed width, for not every version can separate them.
COLUMNS = (("JobID", 32), ("NumTasks", 16), ("tres-alloc", 1024), ("NodeList", 16384))


def find_job_nodes(selection: list[str], slots: int | None, limit: float) -> Counter[str]:
    """Return the slots of each node of running jobs; a node on which two tasks run has those of both.

    Args:
        selection: squeue's options that select the jobs.
        slots: of each node; None for the GPUs allocated on it, or else its tasks.
        limit: seconds that squeue may take.

    Raises:
        RunError: squeue fails or is late, or its answer is not understood.
        OSError: squeue cannot be started.
    """
    return parse_job_table(ask_squeue(selection, limit), slots)


def select_jobs(job: str | None, name: str | None, user: str | None) -> list[str]:
    """Return squeue's options for a job (or job array) by number, or for the jobs of a name."""
    return [f"--jobs={job}"] if job else [f"--name={name}", f"--user={user or getpass.getuser()}"]


def ask_squeue(selection: list[str], limit: float) -> str:
    """Return a line for each running task, in columns."""
    line = ["squeue", "--noheader", "--array", "--states=RUNNING"]
    line.append("--Format=" + ",".join(f"{name}:{width}" for name, width in COLUMNS))
    try:
        done = run_process([*line, *selection], limit)
    except ProcessTimeout:
        raise RunError(f"squeue has not answered within {limit:g} s") from None
    if done.exit_code:
        lines = done.stderr.strip().splitlines()
        raise RunError(f"squeue: {lines[-1] if lines else f'exit {done.exit_code}'}")
    return done.stdout


def parse_job_table(table: str, slots: int | None) -> Counter[str]:
    """Return the slots of each node in squeue's table."""
    found: Counter[str] = Counter()
    for line in table.splitlines():
        cells, begin = [], 0
        for _, width in COLUMNS:
            cells.append(line[begin : begin + width].strip())
            begin += width
        if any(len(cell) >= width for cell, (_, width) in zip(cells, COLUMNS, strict=True)):
            raise RunError(f"squeue: a column is full: {line[:60].strip()} ...")
        job, tasks, resources, nodes = cells
        if not nodes:
            continue  # the task has ended since
        hosts = expand_node_list(nodes)
        each = slots or count_slots_per_node(job, len(hosts), tasks, resources)
        found.update(dict.fromkeys(hosts, each))
    return found


def count_slots_per_node(job: str, nodes: int, tasks: str, resources: str) -> int:
    """Return GPUs per node, or else tasks per node.

    Args:
        job: its number, for messages.
        nodes: how many it has.
        tasks: how many it has.
        resources: what was allocated, e.g. `cpu=8,gres/gpu=8,gres/gpu:a100=8`.

    Raises:
        RunError: the number is not the same for each node.
    """
    amounts = dict(item.partition("=")[::2] for item in resources.split(",") if "=" in item)
    gpus = amounts.get("gres/gpu") or sum(
        int(amount) for name, amount in amounts.items() if name.startswith("gres/gpu:") and amount.isdigit()
    )
    total = int(gpus) if str(gpus).isdigit() and int(gpus) else int(tasks) if tasks.isdigit() else 0
    if total < nodes or total % nodes:
        raise RunError(f"job {job}: {total} GPUs or tasks on {nodes} nodes; give --slots")
    return total // nodes


def find_own_nodes(environ: Mapping[str, str], slots: int | None) -> Counter[str]:
    """Return the slots of each node of the job in whose environment this runs.

    Args:
        environ: the job's environment.
        slots: of each node; None for the GPUs of this node, or else the tasks of each.

    Raises:
        RunError: this is not a job, or its environment is not understood.
    """
    nodes = environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise RunError("not within a Slurm job (SLURM_JOB_NODELIST is not set); give --job or --name")
    hosts = expand_node_list(nodes)
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if slots or (gpus.isdigit() and int(gpus)):
        return Counter(dict.fromkeys(hosts, slots or int(gpus)))
    try:
        counts = parse_repeated_counts(environ.get("SLURM_TASKS_PER_NODE", "1"), "SLURM_TASKS_PER_NODE")
    except UserError as error:
        raise RunError(f"{error}; give --slots") from None
    if len(counts) == 1:
        counts *= len(hosts)
    if len(counts) != len(hosts):
        raise RunError(f"{len(hosts)} nodes, but SLURM_TASKS_PER_NODE is for {len(counts)}; give --slots")
    return Counter(dict(zip(hosts, counts, strict=True)))


def expand_node_list(text: str) -> list[str]:
    """Return the names in a list such as `a,node[01-03,7]`. Raises RunError."""
    try:
        return parse_node_list(text, "NodeList")
    except UserError:
        raise RunError(f"{text!r} is not a list of nodes") from None
