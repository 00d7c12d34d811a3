"""The job scripts for PBS, LSF and mpirun on real hosts, with the files that these batch systems write."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.hosts.cluster import Host, cluster
from tests.ranks.elastic import losses, verify
from tests.ranks.harness import BIN, ROOT, wait_for_step

pytestmark = [pytest.mark.usefixtures("machine_allows_clusters"), pytest.mark.timeout(400)]

RECIPE = str(ROOT / "tests" / "slurm" / "paced_recipe.py")


def start(host: Host, script: str, *args: str, **environ: str) -> subprocess.Popen[str]:
    """A job script from the project's folder, as a batch system starts it."""
    own = {"VENV": str(BIN.parent), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    line = ["bash", str(ROOT / "cluster" / script), *args]
    return host.popen(line, {**own, **environ}, cwd=ROOT, text=True, **streams)


def end(process: subprocess.Popen[str], code: int) -> None:
    said, _ = process.communicate(timeout=150)
    assert process.returncode == code, said


def test_pbs_then_lsf_then_mpirun_train_one_run(tmp_path: Path) -> None:
    """The first two are told that their time ends, and save; each goes on in the same run folder."""
    nodes, hostfile, slowly, run_dir = (tmp_path / name for name in ("nodes", "hostfile", "slowly", "run"))
    nodes.write_text("h0\nh1\n")
    hostfile.write_text("h0 slots=1\nh1 slots=1\n")
    slowly.touch()
    asked = tmp_path / "bin" / "qsub"
    asked.parent.mkdir()
    asked.write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/submitted"\nenv >>"{tmp_path}/submitted"\n')
    asked.chmod(0o755)
    options = ["--slowly", str(slowly), "--epochs", "2", "--log-every", "1", "--threads", "1"]
    batch = {"RECIPE": RECIPE, "OPTIONS": " ".join(options), "RUN_DIR": str(run_dir)}
    batch["PATH"] = f"{asked.parent}{os.pathsep}{os.environ['PATH']}"
    with cluster(2) as (first, _):
        pbs = start(first, "pbs/train.pbs", PBS_JOBID="7.server", PBS_NODEFILE=str(nodes), **batch)
        wait_for_step(run_dir, 2)
        (clock,) = (process for process in first.processes() if process.name() == "timeout")
        clock.send_signal(signal.SIGUSR1)  # what it does when the time is over
        end(pbs, 75)
        submitted = (tmp_path / "submitted").read_text().splitlines()
        assert submitted[0].startswith("-v RECIPE,") and submitted[0].endswith(" cluster/pbs/train.pbs")
        for name in submitted[0].split()[1].split(","):
            assert any(line.startswith(f"{name}=") for line in submitted), name
        done = len(losses(run_dir))
        lsf = start(first, "lsf/train.lsf", LSB_JOBID="7", LSB_DJOB_HOSTFILE=str(nodes), **batch)
        wait_for_step(run_dir, done + 2)
        lsf.send_signal(signal.SIGUSR1)
        end(lsf, 75)
        slowly.unlink()
        end(start(first, "mpi/train.sh", RECIPE, *options, HOSTFILE=str(hostfile), RUN_DIR=str(run_dir)), 0)
    assert done < len(losses(run_dir)) == 24
    verify(run_dir)
