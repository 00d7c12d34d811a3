"""Whether the installed Horovod fits and works: what it was built for, and a real all-reduce per transport."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
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
from hvdtrain.native.torchinfo import Torch, find_torch

RANKS = 2
PROBE_MODULE = "hvdtrain.comm.probe"  # started, never imported: only comm/ imports Horovod
PROBE_MARK = "hvdtrain-check "  # begins the line in which rank 0 of the probe reports
PROBE_SECONDS = 60.0  # time limit of one transport, start included
GRACE_SECONDS = 10.0  # for horovodrun and mpirun to stop their ranks


@dataclass(frozen=True)
class ProbeOutcome:
    """The result of one transport.

    Attributes:
        ok: Whether the all-reduce was right.
        text: How long it took, or what went wrong.
    """

    ok: bool
    text: str


def check_installation(time_limit: float = PROBE_SECONDS) -> bool:
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
    process = subprocess.Popen(
        command,
        env=remove_job_variables(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        return ProbeOutcome(False, f"no answer in {time_limit:.0f} s{likely_reason(stop_probe(process))}")
    finally:
        if process.poll() is None:  # Ctrl-C
            stop_probe(process)
    seconds = time.monotonic() - start
    found = re.search(re.escape(PROBE_MARK) + r"(\{.*\})", output)
    if process.returncode or not found:
        return ProbeOutcome(
            False, f"exit code {process.returncode} after {1000 * seconds:.0f} ms{likely_reason(output)}"
        )
    answer = json.loads(found[1])
    text = f"{answer['ms']:.1f} ms for 4 MiB on {answer['ranks']} ranks, {1000 * seconds:.0f} ms with start and end"
    return ProbeOutcome(answer["ranks"] == RANKS, text)


def stop_probe(process: subprocess.Popen[str]) -> str:
    """Terminate a launcher, which stops its ranks, and kill it if it does not end; return its output."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=GRACE_SECONDS)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


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
