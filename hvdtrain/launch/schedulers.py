"""The hosts that a batch system gave to this job, as it tells them in variables and files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdtrain.launch.hosts import Host, parse_host, parse_hosts, read_hostfile
from hvdtrain.system.errors import UserError
from hvdtrain.system.nodelist import parse_node_list, parse_repeated_counts

# By which variable a job of each batch system is known.
SCHEDULER_VARIABLES = {
    "slurm": "SLURM_JOB_NODELIST",
    "pbs": "PBS_NODEFILE",
    "lsf": "LSB_DJOB_HOSTFILE",
    "sge": "PE_HOSTFILE",
}
# Slurm sets one of these where the user asked for tasks; SLURM_TASKS_PER_NODE is there also where not.
TASK_REQUEST_VARIABLES = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")


def resolve_hosts(
    hosts: str | None, hostfile: Path | None, source: str | None, environ: Mapping[str, str]
) -> list[Host]:
    """The hosts of -H, --hostfile or --from; none if none of them is given. Raises UserError."""
    ways = {"-H": hosts, "--hostfile": hostfile, "--from": source}
    named = [name for name, value in ways.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"give {' or '.join(named)}, not {'both' if len(named) == 2 else 'all of them'}")
    if hosts is not None:
        return parse_hosts(hosts)
    if hostfile is not None:
        return read_hostfile(hostfile)
    return read_allocated_hosts(source, environ) if source is not None else []


def read_allocated_hosts(source: str, environ: Mapping[str, str]) -> list[Host]:
    """The hosts of the job that this runs in, by its batch system: a key of KNOWN_BY, or `auto` for the one there is.

    Raises UserError where there is no such job, or what tells of it is not understood.
    """
    if source == "auto":
        found = [name for name, variable in SCHEDULER_VARIABLES.items() if environ.get(variable)]
        if len(found) != 1:
            looked = ", ".join(f"{variable} ({name})" for name, variable in SCHEDULER_VARIABLES.items())
            many = f"of several batch systems are set: {', '.join(found)}; name one of them"
            raise UserError(f"--from auto: variables {many}" if found else f"--from auto: none is set of {looked}")
        source = found[0]
    variable = SCHEDULER_VARIABLES[source]
    value = environ.get(variable)
    if not value:
        raise UserError(f"--from {source}: {variable} is not set: this is not within such a job")
    if source == "slurm":
        return read_slurm_hosts(environ)
    where = f"{variable} {value}"
    try:
        text = Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    if source == "sge":
        return parse_grid_engine_hosts(text, where)
    hosts = parse_slot_lines(text, where)
    return drop_launch_node(hosts) if source == "lsf" and "CSM_ALLOCATION_ID" in environ else hosts


def read_slurm_hosts(environ: Mapping[str, str]) -> list[Host]:
    """The nodes of a Slurm job. Slots are the tasks that were asked for; where none were, the GPUs of each node.

    SLURM_GPUS_ON_NODE is of this node, and taken for the others. Raises UserError.
    """
    names = parse_node_list(environ["SLURM_JOB_NODELIST"], "SLURM_JOB_NODELIST")
    gpus = environ.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus) and not any(name in environ for name in TASK_REQUEST_VARIABLES):
        return [Host(name, int(gpus)) for name in names]
    tasks = environ.get("SLURM_TASKS_PER_NODE")
    if not tasks:
        raise UserError("--from slurm: neither SLURM_TASKS_PER_NODE nor SLURM_GPUS_ON_NODE is set; use -H")
    slots = parse_repeated_counts(tasks, "SLURM_TASKS_PER_NODE")
    if len(slots) != len(names):
        raise UserError(f"SLURM_TASKS_PER_NODE={tasks} is of {len(slots)} nodes, SLURM_JOB_NODELIST of {len(names)}")
    return require_hosts(
        [Host(name, number) for name, number in zip(names, slots, strict=True) if number], "SLURM_JOB_NODELIST"
    )


def parse_slot_lines(text: str, where: str) -> list[Host]:
    """The hosts of a file that names a host once for each of its slots, as PBS and LSF write it. Raises UserError."""
    slots: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            if ":" in line:
                raise UserError(f"{where} line {number}: {line.strip()!r} is not the name of a host")
            slots[parse_host(line.strip(), f"{where} line {number}").name] += 1
    return require_hosts([Host(name, number) for name, number in slots.items()], where)


def drop_launch_node(hosts: Sequence[Host]) -> list[Host]:
    """The hosts without the launch node, where the job script runs and no rank can.

    LSF lists it first, with one slot, on clusters whose ranks jsrun starts; these are known by CSM_ALLOCATION_ID. On
    other clusters the first host computes like the others.
    """
    return list(hosts[1:] if len(hosts) > 1 and hosts[0].slots == 1 else hosts)


def parse_grid_engine_hosts(text: str, where: str) -> list[Host]:
    """The hosts of Grid Engine's lines `host slots queue processors`; a host's queues add up. Raises UserError."""
    slots: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if words:
            if len(words) < 2 or ":" in words[0]:
                raise UserError(f"{where} line {number}: {line.strip()!r} is not `host slots queue processors`")
            host = parse_host(f"{words[0]}:{words[1]}", f"{where} line {number}")
            slots[host.name] += host.slots
    return require_hosts([Host(name, number) for name, number in slots.items()], where)


def require_hosts(hosts: list[Host], where: str) -> list[Host]:
    """The hosts. Raises UserError if there is none."""
    if not hosts:
        raise UserError(f"{where}: there is no host in it")
    return hosts
