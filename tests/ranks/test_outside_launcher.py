"""A launcher and a scheduler of another distribution, one file with entry points, are as good as hvdtrain's own."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, Job
from tests.support.distributions import write_distribution


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The PYTHONPATH on which the distribution is installed."""
    there = tmp_path / "site"
    there.mkdir()
    points = {"hvdtrain.launchers:spawn": "Spawn", "hvdtrain.schedulers:desk": "Desk"}
    write_distribution(there, ROOT / "tests" / "support" / "outside_launcher.py", points)
    return f"{there}:{ROOT}"


@pytest.mark.slow
def test_a_launcher_of_another_distribution_starts_ranks_that_train(path: str, tmp_path: Path) -> None:
    line = [*HVDTRAIN, "launch", "--launcher", "spawn", "-np", "2", "digits", "--steps", "2"]
    with Job([*line, "--run-dir", str(tmp_path / "run")], env={"PYTHONPATH": path}) as job:
        done = job.finish()
    assert done.returncode == 0, done.stderr
    assert "starting 2 ranks with spawn on localhost" in done.stdout
    assert any(line.startswith("results ") for line in done.stdout.splitlines()), done.stdout
    assert "##hvdtrain" not in done.stdout and '"world_size": 2' in (tmp_path / "run" / "summary.json").read_text()


@pytest.mark.slow
def test_its_words_about_a_rank_that_ended_are_understood(path: str, tmp_path: Path) -> None:
    recipe = tmp_path / "leaves.py"
    text = (ROOT / "recipes" / "digits.py").read_text()
    recipe.write_text(f"{text}\n\nimport os\nif os.environ.get('HOROVOD_RANK') == '1':\n    os._exit(7)\n")
    line = [*HVDTRAIN, "launch", "--launcher", "spawn", "-np", "2", str(recipe), "--steps", "2"]
    environ = {"PYTHONPATH": path, "HOROVOD_GLOO_TIMEOUT_SECONDS": "5"}
    with Job([*line, "--run-dir", str(tmp_path / "run")], env=environ) as job:
        done = job.finish()
    assert done.returncode == 1
    assert "error: rank 1 on localhost ended with code 7 and no message" in done.stderr


@pytest.mark.parametrize("source", ["desk", "auto"])
def test_a_scheduler_of_another_distribution_gives_the_hosts_of_its_job(path: str, source: str) -> None:
    line = [*HVDTRAIN, "launch", "--from", source, "--nic", "lo", "--dry-run", "digits"]
    with Job(line, env={"PYTHONPATH": path, "DESK_HOSTS": "a 2 b 1"}) as job:
        done = job.finish()
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout)[1:5] == ["-np", "3", "-H", "a:2,b:1"]


def test_help_and_errors_name_them(path: str) -> None:
    for arguments, text in (
        (["launch", "--help"], "[desk|lsf|pbs|sge|slurm|auto]"),
        (["launch", "--help"], "[horovodrun|mpirun|spawn|srun]"),
        (["launch", "--help"], "spawn starts processes of this host."),
        (["launch", "--launcher", "spwan", "-np", "2", "digits"], "did you mean 'spawn'?"),
        (["launch", "--launcher", "spawn", "--controller", "mpi", "-np", "2", "digits"], "with spawn it is gloo"),
        (["launch", "--from", "dusk", "digits"], "did you mean 'desk'?"),
    ):
        with Job([*HVDTRAIN, *arguments], env={"PYTHONPATH": path}) as job:
            done = job.finish()
        assert text in " ".join((done.stdout + done.stderr).split()), arguments
