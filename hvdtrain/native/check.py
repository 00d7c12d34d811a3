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

from hvdtrain.native.installed import BUILD, Installed, find, mismatch
from hvdtrain.native.mpi import Mpi, find_mpi
from hvdtrain.native.probe import MARK
from hvdtrain.native.torchinfo import Torch, find_torch

RANKS = 2
LIMIT = 60.0  # seconds for one transport, start included
GRACE = 10.0  # seconds horovodrun and mpirun have to end their ranks


@dataclass(frozen=True)
class Outcome:
    ok: bool
    text: str


def check(limit: float = LIMIT) -> bool:
    """Print what is built and whether it works.

    Returns:
        whether all is well.
    """
    horovod, torch, mpi = find(), find_torch(), find_mpi()
    if horovod is None:
        print(f"Horovod is not installed: {BUILD}")
        return False
    if torch is None:
        print(f"Horovod {horovod.version} is installed, but no torch: pip install torch, then {BUILD}")
        return False
    print(describe(horovod, torch, mpi))
    wrong = mismatch(horovod, torch)
    if wrong:
        print(wrong)
        return False
    fine = True
    for name, command in transports(horovod, mpi).items():
        outcome = reduce_once(command, limit)
        fine = fine and outcome.ok
        print(f"{name:5} {'ok    ' if outcome.ok else 'failed'}  {outcome.text}", flush=True)
    return fine


def describe(horovod: Installed, torch: Torch, mpi: Mpi | None) -> str:
    """What is installed, in a few lines."""
    record = horovod.record
    if record is None:
        built = "not built by hvdtrain: what is in it is not recorded"
    else:
        parts = ["Gloo"]
        parts += [record["mpi"]] if record["mpi"] else []
        parts += [f"NCCL {record['nccl']} (GPUs sm_{', sm_'.join(record['archs'])})"] if record["nccl"] else []
        built = f"built with {', '.join(parts)} for torch {record['torch']}"
    return "\n".join(
        [
            f"Horovod {horovod.version}, {built}",
            f"torch   {torch.version}",
            f"MPI     {f'{mpi.version} in {mpi.home}' if mpi else 'none found'}",
            f"Python  {platform.python_version()}",
        ]
    )


def transports(horovod: Installed, mpi: Mpi | None) -> dict[str, list[str]]:
    """The command that starts the probe on RANKS ranks, for each transport in the build."""
    probe = [sys.executable, "-m", "hvdtrain.native.probe"]
    ranks = ["-np", str(RANKS)]
    commands = {"Gloo": [sys.executable, "-m", "horovod.runner.launch", "--gloo", *ranks, *probe]}
    if mpi and (horovod.record is None or horovod.record["mpi"]):
        options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if mpi.open_mpi else []
        commands["MPI"] = [str(mpi.mpirun), *options, *ranks, *probe]
    return commands


def reduce_once(command: Sequence[str], limit: float) -> Outcome:
    """Run the probe under one launcher."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        env=clean_environment(os.environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return Outcome(False, f"no answer in {limit:.0f} s{last_line(end(process))}")
    finally:
        if process.poll() is None:  # Ctrl-C
            end(process)
    seconds = time.monotonic() - start
    found = re.search(re.escape(MARK) + r"(\{.*\})", output)
    if process.returncode or not found:
        return Outcome(False, f"exit code {process.returncode} after {1000 * seconds:.0f} ms{last_line(output)}")
    answer = json.loads(found[1])
    text = f"{answer['ms']:.1f} ms for 4 MiB on {answer['ranks']} ranks, {1000 * seconds:.0f} ms with start and end"
    return Outcome(answer["ranks"] == RANKS, text)


def end(process: subprocess.Popen[str]) -> str:
    """End a launcher, which ends its ranks; by force if it does not. Returns what it wrote."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            return process.communicate(timeout=GRACE)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


def last_line(output: str) -> str:
    """The line of a failed launcher's output that most likely says why, for the end of a message."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" -\n")]
    telling = [line for line in lines if re.search(r"[A-Z]\w*Error\b|\berror\b", line, re.IGNORECASE)]
    return f": {(telling or lines)[-1][:300]}" if lines else ""


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without an outer job: neither its ranks nor its choices belong to this check.

    LSB_JOBID goes too: with it, horovodrun takes LSF's launcher.
    """
    outer = ("HOROVOD_", "OMPI_COMM_", "OMPI_MCA_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "LSB_JOBID")
    return {name: value for name, value in environment.items() if not name.startswith(outer)}
