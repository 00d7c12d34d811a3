"""`--shares` on real ranks: the mathematics stays where it is, whoever computes how much of a batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.elastic import ElasticJob, verify
from tests.ranks.harness import ROOT
from tests.ranks.test_deterministic import OPTIONS as DETERMINISTIC
from tests.ranks.test_deterministic import VARIED, trained, weights
from tests.ranks.test_resume import RECIPE as STATEFUL
from tests.ranks.test_resume import assert_same
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

HERE = Path(__file__).parent
EXACT = f"{HERE / 'exact_recipe.py'}:Exact"
PACED = str(HERE / "paced_recipes.py")
DIGITS, DIGITS_JAX = (str(ROOT / "recipes" / f"{name}.py") for name in ("digits", "digits_jax"))


def distance(one: Path, other: Path) -> float:
    """The largest difference of two runs' weights."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - value).abs().max()) for name, value in second.items())


def header(run_dir: Path) -> str:
    """The first line of the newest segment of the ledger."""
    return max((run_dir / "ledger").glob("segment-*.csv")).read_text().splitlines()[0]


@pytest.fixture(scope="module")
def even(world2: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("even") / "run"
    train(world2, EXACT, folder, "--shares", "even")
    return folder


@pytest.mark.parametrize(
    ("ranks", "shares"),
    [(2, "3:1"), (3, "2:1:1"), (2, "1:5000"), *slow((3, "9000:1:5000"))],
)
def test_weights_are_those_of_the_even_run(
    ranks: int, shares: str, worlds: KeptWorlds, even: Path, tmp_path: Path
) -> None:
    """Over 2 epochs in float64, the last batch of each of 2 examples; also if a rank, or rank 0, never has any."""
    summary = train(worlds[ranks], EXACT, tmp_path / "uneven", "--shares", shares)
    verify(tmp_path / "uneven")
    assert sum(summary["shares"]) == 1024 and len(summary["shares"]) == ranks
    assert distance(even, tmp_path / "uneven") < 1e-13


@pytest.mark.parametrize(("ranks", "shares"), [(2, "3:1"), (3, "2:1:1")])
def test_weights_of_a_network_are_those_of_the_even_run(
    ranks: int, shares: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    """In float32, with several passes, an EMA and a clipped norm."""
    options = ["--epochs", "2", "--clip-norm", "1", "--ema", "0.9", "--micro-batch", "24", "--batch-size", "100"]
    for name, option in (("even", "even"), ("uneven", shares)):
        train(worlds[ranks], DIGITS, tmp_path / name, "--shares", option, *options)
    assert distance(tmp_path / "even", tmp_path / "uneven") < 1e-6
    (line,) = re.findall("batch     .*", worlds[ranks].printed[0])
    assert line == f"batch     100 global = {ranks} ranks x {4 if ranks == 2 else 3} passes x at most 24"


def test_the_batch_is_dealt_as_the_plan_says(world2: KeptWorld, tmp_path: Path) -> None:
    options = ["--noted", str(tmp_path), "--batch-size", "40", "--epochs", "1"]
    train(world2, f"{PACED}:Noted", tmp_path / "run", "--shares", "3:1", *options)
    assert "shares    768:256 of 1,024 by rank (--shares 3:1), 10 to 30 of 40 examples\n" in world2.printed[0]
    assert "batch     40 global = 2 ranks x 1 pass x at most 30\n" in world2.printed[0]
    passes = [[int(line) for line in (tmp_path / f"rank{rank}").read_text().split()] for rank in (0, 1)]
    # 1,003 examples: the last batch has 3, of which 2.25 are for rank 0; before the first step there is a trial of 2.
    assert [found[-26:] for found in passes] == [[30] * 25 + [2], [10] * 25 + [1]]
    assert header(tmp_path / "run").endswith("first_step=1 shares=768:256")


@pytest.fixture(scope="module")
def even_bits(world2: KeptWorld, tmp_path_factory: pytest.TempPathFactory) -> str:
    return trained(world2, VARIED, tmp_path_factory.mktemp("bits") / "run", *DETERMINISTIC)


@pytest.mark.parametrize(("ranks", "shares"), [(2, "3:1"), (3, "1:1:5000")])
def test_shards_are_dealt_with_the_same_bits(
    ranks: int, shares: str, worlds: KeptWorlds, even_bits: str, tmp_path: Path
) -> None:
    assert trained(worlds[ranks], VARIED, tmp_path / "run", *DETERMINISTIC, "--shares", shares) == even_bits


def test_a_resumed_run_has_the_same_bits(world2: KeptWorld, tmp_path: Path) -> None:
    """In mid-epoch, with dropout, which draws by the places of a rank's examples."""
    options = ["--shares", "3:1", "--checkpoint-every", "20"]
    train(world2, STATEFUL, tmp_path / "whole", *options, "--steps", "50")
    train(world2, STATEFUL, tmp_path / "run", *options, "--steps", "40")
    resumed = train(world2, STATEFUL, tmp_path / "run", "--resume", "--steps", "50")
    assert resumed["resumed_from"] == 40 and resumed["shares"] == [768, 256]
    assert_same(tmp_path / "whole", tmp_path / "run", 50)
    verify(tmp_path / "run")


def saved_shares(run_dir: Path) -> str:
    steps = json.loads((run_dir / "summary.json").read_text())["steps"]
    meta: dict[str, Any] = json.loads((run_dir / "checkpoints" / f"step-{steps}" / "meta.json").read_text())
    shares: str = meta["position"]["shares"]
    return shares


@pytest.mark.timeout(150)
def test_measured_shares_follow_the_ranks_speeds_and_are_resumed(
    world2: KeptWorld, world3: KeptWorld, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    options = ["--shares", "measured", "--diagnose", "--threads", "1"]
    summary = train(world2, f"{PACED}:Paced", folder, *options, "--steps", "52", timeout=100)
    fast, slow = summary["shares"]
    assert 1.2 < fast / slow < 3  # one rank takes twice as long for an example; a busy machine adds to both
    printed = world2.printed[0]
    assert "shares    even (--shares measured), 20 to 20 of 40 examples\n" in printed
    (step,) = re.findall(rf"shares    {fast}:{slow} of 1,024 by rank from step (\d+) on: rank 1 on \S+ takes ", printed)
    assert 22 <= int(step) <= 52
    assert f"{slow} of 1,024 of the batch" in printed or f"the batch is dealt {fast}:{slow} of 1,024 by rank" in printed
    assert json.loads((folder / "diagnose.json").read_text())["shares"] == [fast, slow]
    assert f"# shares {step} {fast}:{slow}\n" in (folder / "ledger" / "segment-000001.csv").read_text()
    verify(folder)
    # The mathematics has not moved.
    train(world2, EXACT, tmp_path / "even", "--batch-size", "40", "--shares", "even")
    assert distance(tmp_path / "even", folder) < 1e-13
    # As many ranks begin with the same shares, others with even ones.
    assert saved_shares(folder) == f"{fast}:{slow}"
    train(world2, f"{PACED}:Paced", folder, "--resume", "--steps", "55")
    assert header(folder).endswith(f" shares={fast}:{slow}")
    train(world3, f"{PACED}:Paced", folder, "--resume", "--steps", "58")
    assert header(folder).endswith(" first_step=56") and saved_shares(folder) == ""
    verify(folder)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_elastic_run_measures_anew_after_a_join(tmp_path: Path) -> None:
    options = ["--shares", "measured", "--pause", "0", "--epochs", "30", "--checkpoint-every", "1000"]
    recipe = f"{PACED}:PacedDigits"
    with ElasticJob(tmp_path, "localhost:2", *options, least=2, most=3, recipe=recipe) as job:
        job.until(lambda: len(measured(job)) == 1, "shares of two ranks")
        job.hosts("localhost:2 127.0.0.1:1")
        job.world(3)
        job.until(lambda: len(measured(job)) == 2, "shares of three ranks")
        job.more(3)
        job.kill(0)  # who writes the ledger
        job.world(2)
        job.end()
    fast, slow = measured(job)[0]
    assert 1.1 < fast / slow < 4
    *others, slow = measured(job)[1]
    assert min(others) / slow > 1.1 and max(others) / slow < 4
    verify(job.run_dir)
    kept = "".join(path.read_text() for path in sorted((job.run_dir / "ledger").glob("segment-*.csv")))
    assert all(f"{':'.join(map(str, shares))}\n" in kept for shares in measured(job)[:2])


def measured(job: ElasticJob) -> list[list[int]]:
    """The shares that were measured so far."""
    found = re.findall(r"shares    ([\d:]+) of 1,024 by rank from step \d+ on", job.said())
    return [[int(part) for part in shares.split(":")] for shares in found]


def test_what_shares_cannot_be_is_refused_by_name(worlds: KeptWorlds, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert refusal(worlds[3], EXACT, folder, "--shares", "3:1") == (
        "--shares 3:1 has 2 numbers, and there are 3 ranks: give one for each rank, in rank order, or --shares measured"
    )
    assert refusal(worlds[2], EXACT, folder, "--shares", "1:2:3").startswith("--shares 1:2:3 has 3 numbers, and ")
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "shares"), [(["--compression", "int8,min=1"], "3:1"), (["--amp", "bf16", "--workers", "1"], "1:3")]
)
def test_shares_go_with_other_options(options: list[str], shares: str, world2: KeptWorld, tmp_path: Path) -> None:
    even, uneven = (
        train(world2, DIGITS, tmp_path / str(number), "--shares", option, "--epochs", "3", *options)
        for number, option in enumerate(("even", shares))
    )
    assert uneven["train_loss"] == pytest.approx(even["train_loss"], rel=0.02)
    verify(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_jax_recipes_have_shares_too(world2: KeptWorld, tmp_path: Path) -> None:
    """And batches that are padded to a rank's own share, not to the largest."""
    options = ["--steps", "14"]  # the twelfth has 29 examples
    even = train(world2, DIGITS_JAX, tmp_path / "even", *options, timeout=120)
    uneven = train(world2, DIGITS_JAX, tmp_path / "uneven", "--shares", "3:1", *options, timeout=120)
    assert distance(tmp_path / "even", tmp_path / "uneven") < 1e-6
    assert uneven["compilations"] <= even["compilations"] + 2  # of another size: forward and backward


def test_evaluations_need_no_shares(world2: KeptWorld, world3: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, EXACT, tmp_path / "run", "--shares", "3:1", "--steps", "5")
    found = world3.run(evaluated, tmp_path / "run")[0]
    assert found["eval"]["loss"] == pytest.approx(summary["eval"]["loss"], rel=1e-12)


def evaluated(run_dir: Path) -> Any:
    import hvdtrain
    from hvdtrain.training.evaluating import evaluate_run

    return evaluate_run(run_dir, "last", None, {}, hvdtrain.init()).metrics
