"""`hvdtrain launch --launcher srun -- COMMAND` on a real Slurm over two nodes: Horovod, variables, errors, stops."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Host, cluster
from tests.ranks.harness import BIN, HVDTRAIN, ROOT
from tests.slurm.cluster import slurm
from tests.support.limits import stretch

pytestmark = [pytest.mark.usefixtures("machine_allows_slurm"), pytest.mark.timeout(300)]

PROGRAM = [sys.executable, str(ROOT / "tests" / "ranks" / "program_rank.py")]
LAUNCH = [*HVDTRAIN, "launch", "--launcher", "srun", "-H", "h0:1,h1:1"]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VENV": str(BIN.parent)}


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Host]]:
    with cluster(2) as hosts, slurm(hosts):
        yield hosts


def launch(nodes: list[Host], *command: str) -> subprocess.CompletedProcess[str]:
    return nodes[0].run([*LAUNCH, "--", *command], ENVIRONMENT, cwd=ROOT)


def test_srun_gives_a_program_all_variables(nodes: list[Host]) -> None:
    done = launch(nodes, *PROGRAM, "variables")
    assert done.returncode == 0, done.stderr
    ranks = sorted((json.loads(text) for text in re.findall(r"^\[\d\] (\{.*)$", done.stdout, re.M)), key=str)
    assert [(rank["RANK"], rank["GROUP_RANK"], rank["LOCAL_RANK"]) for rank in ranks] == [(0, "0", "0"), (1, "1", "0")]
    assert len({rank["MASTER_ADDR"] for rank in ranks}) == 1 and ranks[0]["MASTER_ADDR"] != "127.0.0.1"


def test_horovod_works_unchanged_under_srun(nodes: list[Host]) -> None:
    done = launch(nodes, sys.executable, str(ROOT / "tests" / "programs" / "horovod_torch.py"))
    assert done.returncode == 0 and "done: 2 ranks" in done.stdout, done.stdout + done.stderr


def test_an_error_under_srun_is_shown_once(nodes: list[Host]) -> None:
    done = launch(nodes, *PROGRAM, "raise")
    assert done.returncode == 1
    assert re.search(r"^hvdtrain: error: rank 1 on h1 failed: ValueError: planted", done.stderr, re.M), done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1


def test_the_user_s_own_signal_reaches_programs_under_srun(nodes: list[Host], tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as file:
        line = [*LAUNCH, "--", *PROGRAM, "handle", "0"]
        job = nodes[0].popen(line, ENVIRONMENT, cwd=str(ROOT), stdout=file, stderr=file)
    deadline = time.monotonic() + stretch(60)
    while output.read_text().count("ready") < 2:
        assert time.monotonic() < deadline and job.poll() is None, output.read_text()
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(stretch(60)) == 0, output.read_text()
    assert output.read_text().count(f"ends after signal {int(signal.SIGTERM)}") == 2, output.read_text()
