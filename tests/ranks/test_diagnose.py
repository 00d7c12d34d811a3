"""`--diagnose` on real ranks: the straggler and the drifted rank are named each time, and nobody else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.elastic import ElasticJob
from tests.ranks.harness import HVDTRAIN, ROOT, launcher, run
from tests.ranks.uneven_recipe import EVERY, LONGER, PAUSE, drawn
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, train

RECIPE = str(ROOT / "tests" / "ranks" / "uneven_recipe.py")
RANKS = 4


def diagnosed(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "diagnose.json").read_text())
    return found


@pytest.mark.alone
@pytest.mark.timeout(240)
@pytest.mark.parametrize("intervals", [10, *slow(25)])
def test_the_straggler_is_named_each_time(intervals: int, worlds: KeptWorlds, tmp_path: Path) -> None:
    """In four of five intervals one rank is slow, in its data or its compute, asleep or busy; in the others all are."""
    seed = random.randrange(10**6)
    print(f"drawn from {seed}")
    folder = tmp_path / "run"
    options = ["--diagnose", "--threads", "1", "--steps", str(intervals * EVERY), "--eval-every", "1000"]
    options += ["--draw", str(seed), "--intervals", str(intervals)]
    world = worlds[RANKS]
    train(world, f"{RECIPE}:Uneven", folder, *options, timeout=200)  # a fifth of that where nothing else runs
    printed = world.printed[0]
    found = diagnosed(folder)
    expected = [turn and turn[:2] for turn in drawn(seed, RANKS, intervals)]
    named = [row["straggler"] and (row["straggler"]["rank"], row["straggler"]["cause"]) for row in found["intervals"]]
    assert named == expected, f"{list(zip(named, expected, strict=True))}\n{printed}"
    for interval, (row, turn) in enumerate(zip(found["intervals"], expected, strict=True)):
        assert (row["first_step"], row["last_step"]) == (EVERY * interval + 1, EVERY * (interval + 1))
        if turn is not None:
            rank, cause = turn
            others = [seconds for other, seconds in enumerate(row["seconds"]) if other != rank]
            assert row["seconds"][rank][cause] > max(LONGER, *(seconds[cause] for seconds in others))
            assert row["seconds"][rank]["wait"] < min(seconds["wait"] for seconds in others)
            assert row["straggler"]["host"] == found["hosts"][rank]
            assert row["straggler"]["cost"] > LONGER / 2
    assert sum(found["named"].values()) == intervals * 4 // 5
    # Over all steps it is nobody.
    assert found["end"]["steps"] == intervals * EVERY and found["end"]["straggler"] is None
    assert found["drift"] is None
    first = next(interval for interval, turn in enumerate(expected) if turn is not None)
    rank, cause = expected[first] or (0, "")
    assert f"straggler rank {rank} on {found['hosts'][rank]}: the others wait " in printed
    assert f"diagnose  steps {EVERY * first + 1} to {EVERY * (first + 1)}, medians in ms" in printed
    assert f"; its {cause} takes " in printed
    assert f"diagnose  the last {intervals * EVERY} steps, medians in ms" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, options",
    [
        ("horovodrun", ["--exchange", "horovod", "--micro-batch", "4"]),
        ("launch", ["--compression", "int8,min=1"]),
        ("mpirun", ["--clip-norm", "1.0", "--log-every", "3"]),
    ],
    ids=["horovodrun", "launch", "mpirun"],
)
def test_a_training_whose_replicas_drift_ends(how: str, options: list[str], tmp_path: Path) -> None:
    """It names the step, the tensor and the rank, and saves nothing of it."""
    every = 12 if "--log-every" in options else 10
    draw = random.Random()
    step, rank = draw.randrange(1, 30), draw.randrange(3)
    tensor = draw.choice(["0.weight", "0.bias", "1.weight", "3.weight"])
    print(f"rank {rank}, {tensor}, step {step}")
    folder = tmp_path / "run"
    planted = ["--rank", str(rank), "--at-step", str(step), "--parameter", tensor]
    rest = [f"{RECIPE}:Drifting", "--run-dir", str(folder), "--diagnose", "--steps", "60", *planted, *options]
    rest += ["--threads", "1", "--checkpoint-every", str(every)]
    start = [*HVDTRAIN, "launch", "-np", "3"] if how == "launch" else [*launcher(how, 3), *HVDTRAIN, "train"]
    done = run("alone", 1, [*start, *rest])
    assert done.returncode == 1, done.stdout + done.stderr
    found = diagnosed(folder)
    number = -(-step // every) * every
    host = found["hosts"][rank]
    drift = {"step": number, "tensor": tensor, "majority": True, "ranks": [{"rank": rank, "host": host}], "tensors": 1}
    assert found["drift"] == drift
    said = f"the replicas differ after step {number}, and were the same after step {number - every}: on rank {rank} on "
    assert f"{said}{host}, {tensor} is not what it is on the other 2 ranks" in done.stderr, done.stderr
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert saved == sorted(f"step-{at}" for at in range(every, number, every))


def test_one_rank_has_nothing_to_compare_with(world1: KeptWorld, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(world1, f"{RECIPE}:Uneven", folder, "--diagnose", "--steps", "12")
    assert "one rank: there is nothing to compare" in world1.printed[0]
    (only,) = diagnosed(folder)["end"]["seconds"]
    assert only["compute"] > PAUSE and only["wait"] == 0


def test_virtual_shards_and_the_same_bits_with_and_without(world2: KeptWorld, tmp_path: Path) -> None:
    """Diagnosing changes no number of a training."""
    options = ["--steps", "20", "--deterministic", "--virtual-shards", "6"]
    plain = train(world2, f"{RECIPE}:Even", tmp_path / "plain", *options)
    summary = train(world2, f"{RECIPE}:Even", tmp_path / "run", *options, "--diagnose")
    assert summary["eval"] == plain["eval"] and summary["train_loss"] == plain["train_loss"]
    assert not (tmp_path / "plain" / "diagnose.json").exists()
    assert [row["last_step"] for row in diagnosed(tmp_path / "run")["intervals"]] == [10, 20]


@pytest.mark.slow
def test_an_elastic_run_is_diagnosed_world_by_world(tmp_path: Path) -> None:
    with ElasticJob(tmp_path, "localhost:1", "--pause", "0.4", "--epochs", "4", "--diagnose") as job:
        job.step(11)
        job.hosts("localhost:1 127.0.0.1:1")
        job.world(2)
        job.end()
        assert "one rank: there is nothing to compare" in job.said()
    found = diagnosed(job.run_dir)
    (earlier,) = found["earlier_worlds"]
    assert (earlier["first_step"], earlier["ranks"], earlier["named"]) == (1, 1, {})
    assert earlier["last_step"] >= 10 and found["first_step"] > earlier["last_step"]
    assert len(found["hosts"]) == 2 and found["last_step"] == 48 and len(found["end"]["seconds"]) == 2
