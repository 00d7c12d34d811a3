"""The job scripts of cluster/slurm, submitted to a real Slurm over real hosts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.cluster import Host, cluster
from tests.ranks.elastic import losses, verify
from tests.ranks.harness import BIN, ROOT, train, wait_for_step
from tests.slurm.cluster import GRACE, job, missing, slurm, submit, wait_for
from tests.support.slow_cases import slow

pytestmark = [pytest.mark.usefixtures("machine_allows_slurm"), pytest.mark.timeout(400)]

TRAIN = str(ROOT / "cluster" / "slurm" / "train.sbatch")
RECIPE = str(Path(__file__).with_name("paced_recipe.py"))
ELASTIC = str(ROOT / "cluster" / "slurm" / "elastic.sbatch")
OPTIONS = ["--epochs", "3", "--log-every", "1", "--threads", "1"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
ENVIRONMENT = {
    "VENV": str(BIN.parent),
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[Host]]:
    with cluster(2) as hosts, slurm(hosts):
        yield hosts


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of all steps in a single process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train("alone", 1, "digits", folder, *OPTIONS, cwd=ROOT)
    return losses(folder)


class Submitted:
    """A job script that was submitted on a host, from the project's folder."""

    def __init__(self, host: Host, folder: Path, *line: str, **environ: str) -> None:
        self.host, self.run_dir, self.output = host, folder / "run", folder / "output"
        environ = {**ENVIRONMENT, "RUN_DIR": str(self.run_dir), **environ}
        self.number = submit(host, environ, ROOT, f"--output={self.output}", *line)

    def know(self, name: str) -> str:
        return job(self.host, self.number)[name]

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else "nothing"

    def step(self, number: int) -> None:
        """Wait until so many steps are done."""
        try:
            wait_for_step(self.run_dir, number)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{job(self.host, self.number)}\n{self.said()}") from None

    def signal(self, name: str) -> None:
        """As a user does it who wants to have the job saved and queued again."""
        done = self.host.run(["scancel", "--batch", f"--signal={name}", self.number])
        assert done.returncode == 0, done.stderr

    def end(self, state: str = "COMPLETED", seconds: float = 150) -> None:
        """Wait for the end of the job, in this state."""
        wait_for(lambda: self.know("JobState") in ENDED, seconds, f"end\n{self.said()}")
        assert self.know("JobState") == state, self.said()


def test_a_job_over_two_nodes_is_as_one_process(nodes: list[Host], alone: list[float], tmp_path: Path) -> None:
    job = Submitted(nodes[0], tmp_path, TRAIN, "digits", *OPTIONS)
    job.end()
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["resumed_from"]) == (2, len(alone), None)
    assert losses(job.run_dir) == pytest.approx(alone, rel=1e-5)
    verify(job.run_dir)


@pytest.mark.parametrize("shape", [*slow(((4, 1),)), (2, 2)], ids=lambda shape: f"{shape[0]} nodes x {shape[1]}")
def test_srun_trains_digits_as_one_process(shape: tuple[int, int], tmp_path: Path) -> None:
    options = ["--epochs", "10", "--log-every", "1", "--threads", "1"]
    train("alone", 1, "digits", tmp_path / "alone", *options, cwd=ROOT)
    with cluster(shape[0]) as hosts, slurm(hosts):
        where = [f"--nodes={shape[0]}", f"--ntasks-per-node={shape[1]}"]
        job = Submitted(hosts[0], tmp_path, *where, TRAIN, "digits", *options)
        job.end()
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert summary["world_size"] == 4 and summary["eval"]["accuracy"] >= 0.97
    found, alone = losses(job.run_dir), losses(tmp_path / "alone")
    # What another order of additions rounds otherwise grows with the steps.
    assert found[:48] == pytest.approx(alone[:48], rel=1e-5)
    assert found == pytest.approx(alone, rel=1e-2)


def test_a_job_that_is_cancelled_and_one_that_is_queued_again(
    nodes: list[Host], alone: list[float], tmp_path: Path
) -> None:
    """Each step is made once, through a scancel with a second job, and through a requeue of that."""
    slowly = tmp_path / "slowly"
    slowly.touch()
    line = [TRAIN, RECIPE, "--slowly", str(slowly), *OPTIONS]
    first = Submitted(nodes[0], tmp_path, *line)
    first.step(2)
    nodes[0].run(["scancel", first.number])
    first.end("CANCELLED")
    (saved,) = (int(path.name.removeprefix("step-")) for path in (first.run_dir / "checkpoints").glob("step-*"))
    assert first.know("Restarts") == "0"
    # As one does who prefers ssh.
    second = Submitted(nodes[0], tmp_path, *line, LAUNCH="--launcher horovodrun")
    second.step(saved + 2)
    second.signal("USR1")
    wait_for(lambda: second.know("Restarts") == "1", 60, f"requeue\n{second.said()}")
    slowly.unlink()
    second.end()
    assert second.know("Restarts") == "1"
    resumed = [int(step) for step in re.findall(r"resumed   at step (\d+)", second.said())]
    assert resumed[:2] == [0, saved] and saved + 2 <= resumed[2] < len(alone), second.said()
    assert losses(second.run_dir) == pytest.approx(alone, rel=1e-5)
    verify(second.run_dir)


# Leaves a trace, and asks to be queued again the first time.
PROGRAM = """
import json, os, pathlib, sys
saved = pathlib.Path(os.environ["RUN_DIR"]) / f"rank-{os.environ['RANK']}.json"
code = 0 if saved.exists() else 75
saved.write_text(json.dumps([os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], *sys.argv[1:]]))
sys.exit(code)
"""


def test_a_program_is_queued_again_with_the_words_that_it_was_given(nodes: list[Host], tmp_path: Path) -> None:
    script, words = tmp_path / "my program.py", ["--name", "a b", "$HOME", "it's", "--resume", "*", ""]
    script.write_text(PROGRAM)
    job = Submitted(nodes[0], tmp_path, TRAIN, "--", "python", str(script), *words)
    job.end()
    assert job.know("Restarts") == "1", job.said()
    saved = [json.loads((job.run_dir / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert saved == [["2", "0", *words]] * 2


def test_nodes_that_are_preempted_and_lost(tmp_path: Path) -> None:
    """Of three nodes one is preempted, and comes back, and one loses its power; then the driver is queued again."""
    slowly = tmp_path / "slowly"
    slowly.touch()
    environ = {"POOL": "--partition=spot", "NODES": "3", "SLOTS": "1", "GRACE": str(GRACE)}
    environ |= {"HVDTRAIN_LEASE": "5", "HOROVOD_GLOO_TIMEOUT_SECONDS": "5"}
    line = ["--partition=safe", ELASTIC, RECIPE, "--slowly", str(slowly), *OPTIONS, "--epochs", "20"]
    with cluster(4) as hosts, slurm(hosts):
        job = Submitted(hosts[0], tmp_path, *line, **environ)
        try:
            wait_for(lambda: 3 in worlds(job), 150, "world of 3 ranks")
            submit(hosts[0], {}, tmp_path, "--partition=urgent", "--nodelist=h1", "--output=/dev/null", "--wrap=true")
            wait_for(lambda: worlds(job)[-1] == 2, 60, "world without the node that is preempted")
            before = len(worlds(job))
            hosts[2].down()
            wait_for(lambda: 2 in worlds(job)[before:], 120, "world with the node that came back, without that lost")
            # The time of the driver ends, too.
            job.signal("USR1")
            wait_for(lambda: job.know("Restarts") == "1", 60, "requeue")
            slowly.unlink()
            job.end()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{job.said()}") from None
        wait_for(lambda: not hosts[0].run(["squeue", "--noheader"]).stdout, 40, "end of the pool")
    assert re.findall(r"resumed   at step [1-9]", job.said())
    assert len(losses(job.run_dir)) == 240
    verify(job.run_dir)


@pytest.mark.slow
def test_an_elastic_program_runs_on_the_nodes_of_its_pool(tmp_path: Path) -> None:
    program = str(ROOT / "tests" / "programs" / "horovod_elastic.py")
    environ = {"POOL": "--partition=spot", "NODES": "2", "SLOTS": "1", "MIN_NP": "2", "GRACE": str(GRACE)}
    with cluster(3) as hosts, slurm(hosts):
        job = Submitted(hosts[0], tmp_path, "--partition=safe", ELASTIC, "--", "python", program, **environ)
        job.end()
        wait_for(lambda: not hosts[0].run(["squeue", "--noheader"]).stdout, 40, "end of the pool")
    assert "done: 2 ranks" in job.said(), job.said()


def worlds(job: Submitted) -> list[int]:
    """How many ranks trained together, one world after the other."""
    return [int(number) for number in re.findall(r"(?:world     |global = )(\d+) rank", job.said())]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.setattr("tests.hosts.furnish.SYSTEM_PATH", "")
    assert missing() == "Slurm needs the program munged (package munge)"
