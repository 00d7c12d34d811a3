"""srun, Slurm's launcher: it needs neither ssh nor a PMI library, for the ranks find each other by Gloo."""

from __future__ import annotations

import re
from typing import ClassVar

from hvdtrain.launch.hosts import hosts_by_rank
from hvdtrain.launch.launcher import Launcher, LaunchPlan, register_launcher
from hvdtrain.launch.output import SIGNAL_DESCRIPTIONS, OutputFormat

RANK_EXIT = re.compile(
    r"srun: error: \S+: tasks? (?P<rank>\d+)[-,\d]*: "
    rf"(?:Exited with exit code (?P<code>\d+)|(?P<description>{SIGNAL_DESCRIPTIONS}))"
)


@register_launcher
class Srun(Launcher):
    """One task of a job step for each rank, within a job, or in one of its own on nodes that Slurm chooses."""

    name: ClassVar[str] = "srun"
    help: ClassVar[str] = "srun is Slurm's, and needs no ssh."
    install_hint: ClassVar[str] = "it is a part of Slurm"
    # Each line begins with the rank, as wide as the largest one: " 0: text".
    output: ClassVar[OutputFormat] = OutputFormat(
        label=re.compile(rb" *(?P<rank>\d+): ?"), piece_bytes=1024, rank_exits=(RANK_EXIT,)
    )
    batch_system: ClassVar[str | None] = "slurm"  # passes on SIGUSR1, of the signals by which ranks are asked to stop
    environment_prefixes: ClassVar[tuple[str, ...]] = ("SLURM_", "SLURMD_", "SRUN_")

    def command_line(self, plan: LaunchPlan) -> list[str]:
        """Ranks get all of `plan.environ`, by Slurm's own way."""
        line = [self.find_program(), f"--ntasks={plan.num_ranks}"]
        if [host.name for host in plan.hosts] != ["localhost"]:
            # A name for each rank: the only form that allows different numbers of slots.
            names = ",".join(hosts_by_rank(plan.hosts))
            line += [f"--nodes={len(plan.hosts)}", "--distribution=arbitrary", f"--nodelist={names}"]
        if "SLURM_CPUS_PER_TASK" in plan.environ:  # which steps do not inherit from their job since Slurm 22.05
            line.append(f"--cpus-per-task={plan.environ['SLURM_CPUS_PER_TASK']}")
        interfaces = f",HOROVOD_GLOO_IFACE={plan.nic},NCCL_SOCKET_IFNAME={plan.nic}" if plan.nic else ""
        line += ["--mpi=none", "--label", "--kill-on-bad-exit=1", f"--export=ALL{interfaces}"]
        return [*line, *plan.command]
