"""Whether the installed Horovod fits and works: what it was built for, and a real all-reduce per transport."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.native.installed import (
    BUILD_HINT,
    InstalledHorovod,
    explain_horovod_mismatch,
    find_horovod,
    find_horovods_mpi,
)
from hvdtrain.native.mpi import Mpi, find_mpi
from hvdtrain.native.torchinfo import Torch, explain_untested_torch, find_torch
from hvdtrain.system.limits import NativeLimits
from hvdtrain.system.processes import ProcessTimeout, run_process

RANKS = 2
PROBE_MODULE = "hvdtrain.comm.probe"  # started, never imported: only comm/ imports Horovod
PROBE_MARK = "hvdtrain-check "  # begins the line in which rank 0 of the probe reports


@dataclass(frozen=True)
class ProbeOutcome:
    """The result of one transport.

    Attributes:
        ok: Whether the all-reduce was right.
        text: How long it took, or what went wrong.
    """

    ok: bool
    text: str


def check_installation(time_limit: float = NativeLimits.probe) -> bool:
    """Print what is installed and whether it works.

    Args:
        time_limit: Seconds for each transport.

    Returns:
        Whether everything works.
    """
    horovod, torch = find_horovod(), find_torch()
    if horovod is None:
        print(f"Horovod is not installed: {BUILD_HINT}")
        return False
    if torch is None:
        print(f"Horovod {horovod.version} is installed, but no torch: pip install torch, then {BUILD_HINT}")
        return False
    mpi = find_horovods_mpi() or find_mpi()
    print(describe_installation(horovod, torch, mpi))
    untested = explain_untested_torch(torch)
    if untested:
        print(untested)
    wrong = explain_horovod_mismatch(horovod, torch)
    if wrong:
        print(wrong)
        return False
    fine = True
    for name, command in probe_commands(horovod, mpi).items():
        outcome = run_probe(command, time_limit)
        fine = fine and outcome.ok
        print(f"{name:5} {'ok    ' if outcome.ok else 'failed'}  {outcome.text}", flush=True)
    return fine


def describe_installation(horovod: InstalledHorovod, torch: Torch, mpi: Mpi | None) -> str:
    """Return what is installed, in a few lines."""
    record = horovod.record
    if record is None:
        built = "not built by hvdtrain: its parts are not recorded"
    else:
        parts = ["Gloo"]
        parts += [record.mpi] if record.mpi else []
        parts += [f"NCCL {record.nccl} (GPUs sm_{', sm_'.join(record.archs)})"] if record.nccl else []
        built = f"built with {', '.join(parts)} for torch {record.torch}"
    return "\n".join(
        [
            f"Horovod {horovod.version}, {built}",
            f"torch   {torch.version}",
            f"MPI     {f'{mpi.version} in {mpi.home}' if mpi else 'none found'}",
            f"Python  {platform.python_version()}",
        ]
    )


def probe_commands(horovod: InstalledHorovod, mpi: Mpi | None) -> dict[str, list[str]]:
    """Return, for each transport in the build, the command that starts the probe on RANKS ranks."""
    probe = [sys.executable, "-m", PROBE_MODULE]
    ranks = ["-np", str(RANKS)]
    commands = {"Gloo": [sys.executable, "-m", "horovod.runner.launch", "--gloo", *ranks, *probe]}
    if mpi and (horovod.record is None or horovod.record.mpi):
        options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if mpi.open_mpi else []
        commands["MPI"] = [str(mpi.mpirun), *options, *ranks, *probe]
    return commands


def run_probe(command: Sequence[str], time_limit: float) -> ProbeOutcome:
    """Run the probe under one launcher, for at most `time_limit` seconds."""
    start = time.monotonic()
    environment = remove_job_variables(os.environ)
    try:
        # The launcher stops its ranks, which are in sessions of their own.
        done = run_process(command, time_limit, env=environment, merge_stderr=True, grace=NativeLimits.probe_exit)
    except ProcessTimeout as late:
        return ProbeOutcome(False, f"no answer in {time_limit:.0f} s{likely_reason(late.output)}")
    seconds = time.monotonic() - start
    found = re.search(re.escape(PROBE_MARK) + r"(\{.*\})", done.stdout)
    if done.exit_code or not found:
        reason = likely_reason(done.stdout)
        return ProbeOutcome(False, f"exit code {done.exit_code} after {1000 * seconds:.0f} ms{reason}")
    answer = json.loads(found[1])
    text = f"{answer['ms']:.1f} ms for 4 MiB on {answer['ranks']} ranks, {1000 * seconds:.0f} ms with start and end"
    return ProbeOutcome(answer["ranks"] == RANKS, text)


def likely_reason(output: str) -> str:
    """Return, as the end of a message, the line of a failed launcher's output that most likely gives the reason."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" -\n")]
    telling = [line for line in lines if re.search(r"[A-Z]\w*Error\b|\berror\b", line, re.IGNORECASE)]
    return f": {(telling or lines)[-1][:300]}" if lines else ""


def remove_job_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables of an outer job, whose ranks and settings must not affect the check.

    LSB_JOBID is removed too: with it, horovodrun uses LSF's launcher.
    """
    outer = ("HOROVOD_", "OMPI_COMM_", "OMPI_MCA_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "LSB_JOBID")
    return {name: value for name, value in environment.items() if not name.startswith(outer)}
