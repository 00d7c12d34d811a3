"""Notices of Slurm, which sends signals before it ends or preempts a job."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain.preemption.source import NoticeSource, notice_source


@notice_source("slurm")
@dataclass(kw_only=True)
class SlurmSource(NoticeSource):
    """Slurm: SIGTERM, SIGCONT or SIGUSR1 to the agent is the notice; the agent ends at the deadline."""

    notice_signals = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1)
    exits_at_deadline = True

    def read_boot_id(self, environ: Mapping[str, str] = os.environ) -> str:
        """Return the kernel's boot id with the job and how often it was requeued.

        Slurm takes a node from a job without a boot, and may give it back to the next one.
        """
        boot = super().read_boot_id(environ)
        if "SLURM_JOB_ID" not in environ:
            return boot
        return f"{boot}+{environ['SLURM_JOB_ID']}.{environ.get('SLURM_RESTART_COUNT', '0')}"
