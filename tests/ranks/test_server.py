"""`--server` on real ranks under horovodrun and mpirun: the mathematics of each policy, replay, faults and refusals."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import hvdtrain
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.ledger.verify import verify_ledger
from hvdtrain.recipe.framework import find_framework
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.registry import load_recipe
from hvdtrain.server.served_step import check_served_step
from hvdtrain.system.errors import UserError
from tests.ranks.harness import HVDTRAIN, Job, launcher, rows, run, train, wait_for_step
from tests.ranks.server_recipes import Least, replay_by_numpy
from tests.ranks.test_deterministic import weights
from tests.ranks.test_resume import state
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, on_ranks
from tests.support.worlds import train as train_on

HERE = Path(__file__).parent
LEAST, DROPPING = (f"{HERE / 'server_recipes.py'}:{name}" for name in ("Least", "Dropping"))
POLICIES = ("sync", "backup:1", "bounded:1", "async", "async+dc")


def run_policies(kind: str, folder: Path, recipe: str, *policies: str, servers: int = 1, workers: int = 3) -> None:
    """Train once with each policy."""
    script = [sys.executable, str(HERE / "server_runs.py"), str(folder), recipe, str(servers), *policies]
    done = run(kind, servers + workers, script)
    assert done.returncode == 0, done.stdout + done.stderr


def verify(run_dir: Path, *options: str) -> str:
    """What `hvdtrain ledger verify` prints; fails unless all is right."""
    done = run("alone", 1, [*HVDTRAIN, "ledger", "verify", *options, str(run_dir)])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=["horovodrun", *slow("mpirun")])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Least squares with each policy; one server, three workers."""
    folder = tmp_path_factory.mktemp("served")
    run_policies(request.param, folder, "Least", *POLICIES)
    return folder


def find_ranks(job: Job) -> dict[int, psutil.Process]:
    """The job's processes by their rank."""
    found = {}
    for process in job.ranks():
        environ = process.environ()
        found[int(environ.get("OMPI_COMM_WORLD_RANK") or environ["HOROVOD_RANK"])] = process
    return found


def only_weight(run_dir: Path) -> np.ndarray[Any, Any]:
    (value,) = weights(run_dir).values()
    return np.asarray(value[0])


def test_synchronous_updates_are_those_of_the_plain_run(served: Path, tmp_path: Path) -> None:
    """Each step of 2 epochs in float64, the last batch of each of 3 examples."""
    train("alone", 1, LEAST, tmp_path / "plain", "--log-every", "1")
    plain, with_server = rows(tmp_path / "plain"), rows(served / "sync")
    for name in ("samples", "loss", "within", "lr", "epoch"):
        assert [row[name] for row in with_server] == pytest.approx([row[name] for row in plain], rel=1e-12)
    assert abs(only_weight(served / "sync") - only_weight(tmp_path / "plain")).max() < 1e-13


@pytest.mark.parametrize("staleness", ["bounded:1", "async", *slow("sync", "backup:1")])
def test_every_policy_is_momentum_sgd_on_the_gradients_that_its_ledger_names(staleness: str, served: Path) -> None:
    folder = served / staleness.replace(":", "-")
    found = verify_ledger(folder)
    assert found.is_exactly_once and found.epochs == 2 and found.staleness is not None
    recipe = Least()
    batch = recipe.batch_size if staleness in ("sync", "backup:1") else -(-recipe.batch_size // 3)
    assert abs(replay_by_numpy(folder, recipe, batch) - only_weight(folder)).max() < 1e-12
    summary = json.loads((folder / "summary.json").read_text())
    service = summary["service"]
    assert summary["world_size"] == 4 and summary["samples_seen"] == 2 * 1003
    assert service["staleness_max"] == found.staleness.most
    assert service["items_handed_out"] == service["items_applied"] + service["items_late"]
    assert len(rows(folder)) == summary["steps"] == found.steps


@pytest.mark.parametrize("staleness", ["async+dc", *slow("sync", "backup:1", "bounded:1")])
def test_a_replay_in_one_process_has_the_same_bits(staleness: str, served: Path) -> None:
    folder = served / staleness.replace(":", "-")
    assert f"to the same bits as the checkpoint of step {verify_ledger(folder).steps}" in verify(folder, "--replay")


@pytest.mark.slow
def test_a_replay_notices_other_bits(served: Path, tmp_path: Path) -> None:
    """Of a gradient that the ledger says was computed with the weights before those that it was computed with."""
    folder = shutil.copytree(served / "async", tmp_path / "run", symlinks=True)
    (path,) = (folder / "ledger").glob("segment-*.csv")
    lines = path.read_text().split("\n")
    number = next(i for i, line in enumerate(lines) if line.startswith("# made 40"))
    _, _, step, factor, item = lines[number].split()
    read, positions = item.split(":")
    lines[number] = f"# made {step} {factor} {int(read) - 1}:{positions}"
    path.write_text("\n".join(lines))
    done = run("alone", 1, [*HVDTRAIN, "ledger", "verify", "--replay", str(folder)])
    assert done.returncode == 1 and "differ from the checkpoint of step" in done.stdout


@pytest.mark.parametrize("kind", ["mpirun", *slow("horovodrun")])
def test_two_servers_with_half_of_the_model_each_are_the_plain_run(
    kind: str, world2: KeptWorld, tmp_path: Path
) -> None:
    """On as many ranks as workers, with dropout, and AdamW, whose state each has for its own parameters."""
    train_on(world2, DROPPING, tmp_path / "plain", "--threads", "1")
    run_policies(kind, tmp_path, "Dropping", "sync", servers=2, workers=2)
    plain, two = state(tmp_path / "plain", 52), state(tmp_path / "sync", 52)
    assert {name for name in plain if ".exchange" not in name} == two.keys()
    for name, value in plain.items():
        if isinstance(value, torch.Tensor) and name in two:
            torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["horovodrun", "mpirun"])
def test_two_servers_are_resumed_from_a_checkpoint_that_has_all(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [*HVDTRAIN, "train", DROPPING, "--run-dir", str(folder), "--threads", "1", "--server", "2"]
    for options in (["--staleness", "async+dc"], ["--staleness", "bounded:1", "--resume", "--epochs", "3"]):
        done = run(kind, 4, [*command, *options])
        assert done.returncode == 0, done.stdout + done.stderr
    assert "exactly once: 3 epochs" in (printed := verify(folder, "--replay")) and "to the same bits" in printed


@pytest.mark.parametrize("victim", [*slow(0), 2])
@pytest.mark.parametrize("kind", ["horovodrun", *slow("mpirun")])
def test_a_run_whose_server_or_worker_was_killed_is_resumed_exactly(kind: str, victim: int, tmp_path: Path) -> None:
    """In float32, with dropout and AdamW; on as many ranks as are left."""
    folder = tmp_path / "run"
    options = [
        "--server",
        "1",
        "--staleness",
        "async",
        "--log-every",
        "1",
        "--checkpoint-every",
        "10",
        "--threads",
        "1",
    ]
    command = [*launcher(kind, 4), *HVDTRAIN, "train", DROPPING, "--run-dir", str(folder), *options]
    with Job(command, env={"HVDTRAIN_TEST_PACE": "0.02"}) as job:
        wait_for_step(folder, 25)
        find_ranks(job)[victim].send_signal(signal.SIGKILL)
        done = job.finish()
    assert done.returncode not in (0, 75)
    done = run(kind, 3, [*HVDTRAIN, "train", DROPPING, "--run-dir", str(folder), "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["resumed_from"] >= 20 and summary["samples_seen"] == 2 * 1003
    assert "exactly once: 2 epochs" in (printed := verify(folder, "--replay")) and "to the same bits" in printed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["horovodrun", "mpirun"])
def test_a_stopped_run_is_saved_in_mid_epoch_with_what_is_out(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--server", "1", "--staleness", "bounded:2", "--log-every", "1", "--threads", "1"]
    command = [*launcher(kind, 3), *HVDTRAIN, "train", DROPPING, "--run-dir", str(folder), *options]
    with Job(command, env={"HVDTRAIN_TEST_PACE": "0.02"}) as job:
        wait_for_step(folder, 12)
        find_ranks(job)[1].send_signal(signal.SIGTERM)  # a worker tells the server
        # horovodrun has its own exit code for a rank that does not exit with 0.
        assert job.finish().returncode == (75 if kind == "mpirun" else 1)
    assert not json.loads((folder / "summary.json").read_text())["finished"]
    verify(folder)
    done = run(kind, 3, [*HVDTRAIN, "train", DROPPING, "--run-dir", str(folder), "--resume"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exactly once: 2 epochs" in (printed := verify(folder, "--replay")) and "to the same bits" in printed


@on_ranks(2)
def test_what_a_server_cannot_train_is_refused_by_name() -> None:
    world = hvdtrain.init()
    for recipe, text in (
        (f"{HERE / 'exact_recipe.py'}:Noisy", "Noisy: each worker's 1.running_mean would follow other examples"),
        (f"{HERE / 'several_recipes.py'}:Duel", "Duel: it has several optimizers; return one from optimizer()"),
        (f"{HERE / 'memory_recipes.py'}:Memory", "Memory: each worker would remember something else in its state()"),
        (f"{HERE / 'contrastive_recipes.py'}:SimCLR", "SimCLR: its score calls collectives"),
        (f"{HERE / 'sampled_recipe.py'}:SampledDigits", "SampledDigits: its sampler's order may have an example twice"),
        (f"{HERE / 'jax_recipes.py'}:Line", "Line: recipes of the framework jax are not served"),
        (f"{HERE / 'server_recipes.py'}:Streamed", "Streamed: its examples have no numbers"),
    ):
        cls = load_recipe(recipe)
        made = cls()
        set_now(made, Now.before_training(Path(), world.rank, world.size))
        step = find_framework(cls).make_step(made, world, StepOptions())
        with pytest.raises(UserError) as caught:
            check_served_step(step, cls.__name__)
        step.close()
        assert text in str(caught.value), recipe
