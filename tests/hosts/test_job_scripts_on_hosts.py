"""The job scripts for PBS, LSF and mpirun on real hosts, with the files that these batch systems write."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from tests.hosts.cluster import Host, cluster
from tests.ranks.elastic import losses, verify
from tests.ranks.harness import BIN, ROOT, wait_for_step
from tests.support.limits import stretch

pytestmark = [pytest.mark.usefixtures("machine_allows_clusters"), pytest.mark.timeout(400)]

RECIPE = str(ROOT / "tests" / "slurm" / "paced_recipe.py")


def start(host: Host, script: str, *args: str, **environ: str) -> subprocess.Popen[str]:
    """A job script from the project's folder, as a batch system starts it."""
    own = {"VENV": str(BIN.parent), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    line = ["bash", str(ROOT / "cluster" / script), *args]
    return host.popen(line, {**own, **environ}, cwd=ROOT, text=True, **streams)


def end(process: subprocess.Popen[str], code: int) -> None:
    said, _ = process.communicate(timeout=stretch(150))
    assert process.returncode == code, said


@pytest.mark.slow
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


# Saves what it is given, and asks to be queued again the first time.
PROGRAM = """
import json, os, pathlib, sys
saved = pathlib.Path(os.environ["RUN_DIR"]) / f"rank-{os.environ['RANK']}.json"
code = 0 if saved.exists() else 75
names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
saved.write_text(json.dumps([*(os.environ[name] for name in names), *sys.argv[1:]]))
sys.exit(code)
"""
WORDS = [
    "--name",
    "a b",
    "$HOME",
    "~",
    "it's",
    '"',
    "*",
    "; exit 1",
    "--resume",
    "-np",
    "",
    "\u00e4",
    "a\nb",
    "<&|",
    "\\",
]


def test_pbs_then_mpirun_start_a_program_with_the_words_that_it_was_given(tmp_path: Path) -> None:
    """Over ssh too, no shell takes them apart; exit code 75 submits the job again."""
    nodes, hostfile, run_dir, script = (tmp_path / name for name in ("nodes", "hostfile", "run", "my program.py"))
    nodes.write_text("h0\nh1\n")
    hostfile.write_text("h0 slots=1\nh1 slots=1\n")
    script.write_text(PROGRAM)
    asked = tmp_path / "bin" / "qsub"
    asked.parent.mkdir()
    asked.write_text(f'#!/bin/sh\nprintf %s "$PROGRAM" >"{tmp_path}/submitted"\n')
    asked.chmod(0o755)
    path = f"{asked.parent}{os.pathsep}{os.environ['PATH']}"
    own = {"RUN_DIR": str(run_dir), "PATH": path}
    with cluster(2) as (first, _):
        words = [str(script), *WORDS]
        pbs = start(first, "pbs/train.pbs", PBS_JOBID="7", PBS_NODEFILE=str(nodes), PROGRAM=shlex.join(words), **own)
        end(pbs, 75)
        assert shlex.split((tmp_path / "submitted").read_text()) == words
        saved = [json.loads((run_dir / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        assert saved == [["2", "0", saved[0][2], *WORDS]] * 2
        end(start(first, "mpi/train.sh", "--", "python", *words, HOSTFILE=str(hostfile), **own), 0)
        again = [json.loads((run_dir / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
        assert again == [["2", "0", again[0][2], *WORDS]] * 2
