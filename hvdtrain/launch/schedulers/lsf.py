"""LSF: a file that names a host once for each of its slots, like that of PBS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from hvdtrain.launch.hosts import Host
from hvdtrain.launch.scheduler import Scheduler, register_scheduler
from hvdtrain.launch.schedulers.pbs import read_slot_lines


@register_scheduler
class Lsf(Scheduler):
    """Slots are a host's lines in LSB_DJOB_HOSTFILE, without the launch node.

    LSF lists the launch node, where the job script runs and no rank can, first and with one slot, on clusters whose
    ranks are started by jsrun; these are known by CSM_ALLOCATION_ID. On other clusters the first host computes like the
    others.
    """

    name: ClassVar[str] = "lsf"
    variable: ClassVar[str] = "LSB_DJOB_HOSTFILE"
    slots_help: ClassVar[str] = "a host's lines in its file, without a host that can only launch"

    def read_hosts(self, environ: Mapping[str, str]) -> list[Host]:
        hosts = read_slot_lines(self.variable, environ)
        has_launch_node = "CSM_ALLOCATION_ID" in environ and len(hosts) > 1 and hosts[0].slots == 1
        return hosts[1:] if has_launch_node else hosts
