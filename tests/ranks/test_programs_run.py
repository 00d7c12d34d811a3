"""`hvdtrain launch -- COMMAND`: variables, errors, exit codes, signals, output and relaunches of any program."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, Job
from tests.support.limits import stretch

PROGRAM = [sys.executable, str(ROOT / "tests" / "ranks" / "program_rank.py")]
LAUNCH = [*HVDTRAIN, "launch", "-np", "2"]


def launch(*args: str, options: tuple[str, ...] = (), **environ: str) -> subprocess.CompletedProcess[str]:
    with Job([*LAUNCH, *options, "--", *PROGRAM, *args], env=environ) as job:
        return job.finish()


def start_and_wait(output: Path, *args: str, options: tuple[str, ...] = ()) -> Job:
    """Start a launch, and return it once the program runs on both ranks."""
    job = Job([*LAUNCH, *options, "--", *PROGRAM, *args], output=output)
    deadline = time.monotonic() + stretch(60)
    while output.read_text().count("ready") < 2:
        assert time.monotonic() < deadline and job.process.poll() is None, output.read_text()
        time.sleep(0.05)
    return job


@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_ranks_have_the_variables_of_all_frameworks(launcher: str) -> None:
    done = launch("variables", options=("--launcher", launcher), MASTER_PORT="29500")
    assert done.returncode == 0, done.stderr
    ranks = sorted((json.loads(text) for text in re.findall(r"^\[\d\] (\{.*)$", done.stdout, re.M)), key=str)
    assert [rank["RANK"] for rank in ranks] == [0, 1] and [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1"]
    assert {(rank["WORLD_SIZE"], rank["LOCAL_WORLD_SIZE"], rank["GROUP_RANK"]) for rank in ranks} == {("2", "2", "0")}
    for name in ("MASTER_ADDR", "MASTER_PORT", "JAX_COORDINATOR_ADDRESS", "TORCHELASTIC_RUN_ID"):
        assert len({rank[name] for rank in ranks}) == 1 and ranks[0][name], name
    assert ranks[0]["MASTER_PORT"] != "29500" and "MASTER_PORT of the environment is not used" in done.stdout
    assert ranks[0]["CUDA_VISIBLE_DEVICES"] is None and ranks[0]["HVDTRAIN_RELAUNCH"] is None
    config = [json.loads(rank["TF_CONFIG"]) for rank in ranks]
    assert config[0]["cluster"] == config[1]["cluster"] and len(set(config[0]["cluster"]["worker"])) == 2
    assert [one["task"] for one in config] == [{"type": "worker", "index": index} for index in (0, 1)]


def test_a_traceback_is_shown_once_with_rank_and_host() -> None:
    done = launch("raise")
    assert done.returncode == 1
    assert re.search(r"^hvdtrain: error: rank 1 on \S+ failed: ValueError: planted on rank 1$", done.stderr, re.M)
    assert done.stderr.count("Traceback (most recent call last)") == 1 and done.stderr.count("second line") == 2


def test_a_rank_that_lost_another_one_is_not_the_cause() -> None:
    done = launch("lost-peer", options=("--launcher", "mpirun"))
    assert done.returncode == 128 + signal.SIGSEGV, done.stderr
    assert "rank 1" in done.stderr.partition("hvdtrain: error: ")[2] and "(SIGSEGV)" in done.stderr


@pytest.mark.parametrize(("mode", "value", "code"), [("exit", "2", 2), ("requeue", "", 75)])
def test_the_exit_code_is_the_program_s(mode: str, value: str, code: int) -> None:
    done = launch(mode, value, options=("--relaunch", "1"))
    assert done.returncode == code, done.stderr
    assert "relaunch 1" not in done.stderr


def test_output_passes_unharmed_and_a_logged_exception_is_kept() -> None:
    command = [*HVDTRAIN, "launch", "-np", "1", "--", *PROGRAM, "output", "20000"]
    done = subprocess.run(command, capture_output=True, timeout=stretch(100), check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix(b"[0] ") for line in done.stdout.splitlines()]
    assert b"latin \xe9 \xff\xfe end" in lines and "four bytes \U0001f600".encode() in lines
    assert [b"step %d" % step for step in range(3)] == [line for line in lines if line.startswith(b"step")]
    assert b"x" * 300_000 in lines and lines[-1] == b"no end of line"
    assert [b"line %d" % number for number in range(20000)] == [line for line in lines if line.startswith(b"line ")]
    assert done.stderr.count(b"KeyError: 'logged'") == 1 and b"rank 0 continues" in done.stderr


@pytest.mark.parametrize(
    ("mode", "value", "number", "code"),
    [
        ("wait", "", signal.SIGINT, 128 + signal.SIGINT),
        ("handle", "0", signal.SIGUSR1, 0),
    ],
)
def test_the_user_s_signal_reaches_every_rank(tmp_path: Path, mode: str, value: str, number: int, code: int) -> None:
    output = tmp_path / "output"
    output.touch()
    with start_and_wait(output, mode, value) as job:
        job.process.send_signal(number)
        done = job.finish()  # fails if a child of a program is left
    text = output.read_text()
    assert done.returncode == code, text
    assert "Traceback" not in text and "error" not in text
    if mode == "handle":
        assert {f"rank {rank} ends after signal {number}" for rank in (0, 1)} <= set(
            re.findall(r"rank \d ends.*", text)
        )


def test_a_program_that_ignores_a_stop_is_killed_after_the_grace(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.touch()
    with start_and_wait(output, "ignore", options=("--grace", "1.5")) as job:
        job.process.send_signal(signal.SIGTERM)
        assert job.finish().returncode == 128 + signal.SIGTERM
    assert "have not ended within 1.5 s" in output.read_text()


def test_a_program_that_failed_is_started_again_and_knows_it() -> None:
    done = launch("attempts", "1", options=("--relaunch", "2"))
    assert done.returncode == 0, done.stderr
    assert "relaunch 1 of 2" in done.stderr and "exit code 9" in done.stderr and "relaunch 2" not in done.stderr


def test_the_printed_line_starts_the_same(tmp_path: Path) -> None:
    with Job([*LAUNCH, "--dry-run", "--", *PROGRAM, "variables"]) as job:
        line = job.finish().stdout
    with Job(["bash", "-c", line]) as job:
        done = job.finish()
    assert done.returncode == 0 and done.stdout.count('"MASTER_ADDR": "127.0.0.1"') == 2, done.stdout + done.stderr


@pytest.mark.slow
def test_a_lost_worker_does_not_end_an_elastic_program(tmp_path: Path) -> None:
    script = tmp_path / "elastic.py"
    script.write_text(
        "import os, pathlib, time, torch\n"
        "import horovod.torch as hvd\n"
        "hvd.init()\n"
        "mark = pathlib.Path(__file__).with_name('mark')\n"
        "@hvd.elastic.run\n"
        "def train(state):\n"
        "    while state.step < 30:\n"
        "        hvd.allreduce(torch.ones(1), name='x')\n"
        "        if state.step == 10 and hvd.rank() == 1 and not mark.exists():\n"
        "            mark.write_text('')\n"
        "            raise ValueError('planted')\n"
        "        time.sleep(0.1)\n"
        "        state.step += 1\n"
        "        state.commit()\n"
        "train(hvd.elastic.TorchState(model=torch.nn.Linear(1, 1), step=0))\n"
        "print('trained', flush=True)\n"
    )
    line = [*HVDTRAIN, "launch", "--elastic", "-H", "localhost:1,127.0.0.1:1", "--", sys.executable, str(script)]
    with Job(line) as job:
        done = job.finish()
    assert done.returncode == 0, done.stderr
    assert "failed, the others continue: ValueError: planted" in done.stderr and "trained" in done.stdout
