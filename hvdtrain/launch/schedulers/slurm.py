"""Slurm: the nodes of a job, with a slot for each task that was requested, or for each GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hvdtrain.launch.hosts import Host
from hvdtrain.launch.scheduler import Scheduler, register_scheduler, sum_slots
from hvdtrain.system.errors import UserError
from hvdtrain.system.nodelist import parse_node_list, parse_repeated_counts

# Slurm sets one of these if the user requested tasks; SLURM_TASKS_PER_NODE is always set.
TASK_REQUEST_VARIABLES = ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")


@register_scheduler
class Slurm(Scheduler):
    """Slots are the tasks that were requested; if none were, the GPUs of each node.

    SLURM_GPUS_ON_NODE is the number of this node, and taken for the others.
    """

    name: ClassVar[str] = "slurm"
    variable: ClassVar[str] = "SLURM_JOB_NODELIST"
    slots_help: ClassVar[str] = "its tasks, or its GPUs if no tasks were requested"

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        names = parse_node_list(environ[self.variable], self.variable)
        gpus = environ.get("SLURM_GPUS_ON_NODE", "")
        if gpus.isdecimal() and int(gpus) and not any(name in environ for name in TASK_REQUEST_VARIABLES):
            return [Host(name, int(gpus)) for name in names]
        tasks = environ.get("SLURM_TASKS_PER_NODE")
        if not tasks:
            raise UserError("--from slurm: neither SLURM_TASKS_PER_NODE nor SLURM_GPUS_ON_NODE is set; use -H")
        slots = parse_repeated_counts(tasks, "SLURM_TASKS_PER_NODE")
        if len(slots) != len(names):
            raise UserError(f"SLURM_TASKS_PER_NODE={tasks} is for {len(slots)} nodes, {self.variable} for {len(names)}")
        return sum_slots((Host(*pair) for pair in zip(names, slots, strict=True) if pair[1]), self.variable)
