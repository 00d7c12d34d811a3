"""--stages: ranks hold a model together, and training is that of one rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.ranks.elastic import ElasticJob, verify
from tests.ranks.harness import HVDTRAIN, rows, run
from tests.ranks.test_sharded_optimizer import assert_same
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

RECIPES = Path(__file__).parent / "pipeline_recipes.py"
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zerobubble")
COMMON = ("--log-every", "1", "--threads", "1")


def stages(schedule: str) -> tuple[str, ...]:
    return ("--stages", "2", "--pipeline-schedule", schedule)


ESSENCE = [("Digits64", "1f1b"), ("CharLM64", "interleaved"), ("Chain", "zerobubble"), ("Translate64", "gpipe")]
OTHERS = [(r, s) for r in ("Digits64", "CharLM64", "Chain", "Translate64") for s in SCHEDULES if (r, s) not in ESSENCE]


@pytest.mark.parametrize(("recipe", "schedule"), [*ESSENCE, *slow(*OTHERS)])
def test_two_replicas_of_two_stages_train_as_one_rank(
    recipe: str, schedule: str, worlds: KeptWorlds, tmp_path: Path
) -> None:
    """The last step of the epoch is ragged."""
    name = f"{RECIPES}:{recipe}"
    one = train(worlds[1], name, tmp_path / "one", *COMMON)
    four = train(worlds[4], name, tmp_path / "four", *COMMON, *stages(schedule))
    assert_same(tmp_path / "one", tmp_path / "four", 1e-10)
    for mine, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-10)
    assert one["eval"] == pytest.approx(four["eval"], rel=1e-10)


def test_float32_follows_one_rank_step_by_step(worlds: KeptWorlds, tmp_path: Path) -> None:
    """SGD with momentum, two replicas of two stages."""
    name, options = f"{RECIPES}:Digits64", (*COMMON, "--no-double")
    train(worlds[1], name, tmp_path / "one", *options)
    train(worlds[4], name, tmp_path / "four", *options, *stages("1f1b"))
    for mine, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("recipe", ["Summarising", "Returning"])
def test_outputs_are_summarised(recipe: str, worlds: KeptWorlds, tmp_path: Path) -> None:
    found = [
        train(worlds[ranks], f"{RECIPES}:{recipe}", tmp_path / str(ranks), *COMMON, "--ema", "0.9", *more)["eval"]
        for ranks, more in ((1, ()), (4, stages("interleaved")))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-10)


@pytest.mark.slow
def test_ranks_of_mpirun_train_as_one_rank(world1: KeptWorld, tmp_path: Path) -> None:
    name = f"{RECIPES}:Digits64"
    train(world1, name, tmp_path / "one", *COMMON)
    command = [*HVDTRAIN, "train", name, "--run-dir", str(tmp_path / "four"), *COMMON, *stages("1f1b")]
    done = run("mpirun", 4, command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(tmp_path / "one", tmp_path / "four", 1e-10)


@pytest.mark.parametrize("more", [("--schedule", "cosine"), ("--seeded", "--steps", "2")], ids=["ragged", "random"])
def test_clipping_averages_and_groups_are_those_of_one_rank(
    more: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path
) -> None:
    """Groups by name; a pair as loss; what score draws is drawn alike for the first stage and for the last."""
    options = (*COMMON, "--kind", "adamw", "--clip-norm", "0.5", "--ema", "0.9", *more)
    train(worlds[1], f"{RECIPES}:Chain", tmp_path / "one", *options, "--micro-batch", "3")
    train(worlds[4], f"{RECIPES}:Chain", tmp_path / "four", *options, "--micro-batch", "3", *stages("interleaved"))
    assert_same(tmp_path / "one", tmp_path / "four", 1e-10)
    for mine, theirs in zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True):
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--no-double",), ("--no-double", "--amp", "bf16")], ids=["float32", "bf16"])
def test_one_replica_has_the_bits_of_one_rank_with_the_same_micro_batches(
    options: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path
) -> None:
    """Without a ragged step: what is filled up changes how a product of matrices is rounded."""
    options = (*COMMON, *options, "--batch-size", "28", "--micro-batch", "7", "--steps", "4")
    train(worlds[1], f"{RECIPES}:Digits64", tmp_path / "one", *options)
    train(worlds[2], f"{RECIPES}:Digits64", tmp_path / "two", *options, *stages("1f1b"))
    assert_same(tmp_path / "one", tmp_path / "two", 1e-6)


def test_a_run_is_resumed_on_other_layouts(worlds: KeptWorlds, tmp_path: Path) -> None:
    """2 x 2, then one rank, then 2 x 2 with split layers or another schedule; the embedding is in two stages."""
    options = (*COMMON, "--ema", "0.9", "--clip-norm", "1", "--schedule", "constant")
    whole, name = tmp_path / "whole", f"{RECIPES}:CharLM64"
    train(worlds[1], name, whole, *options, "--steps", "7")
    alone, tensor = ("--stages", "1"), ("--stages", "1", "--tensor", "2")
    pipeline = (*stages("interleaved"), "--tensor", "1")
    for steps, world, more in ((2, 4, stages("1f1b")), (4, 1, alone), (6, 4, tensor), (7, 4, pipeline)):
        train(worlds[world], name, tmp_path / "parts", *options, "--steps", str(steps), "--resume", *more)
    assert_same(whole, tmp_path / "parts", 1e-9)


@pytest.mark.slow
def test_residuals_of_compression_are_resumed_on_other_layouts(worlds: KeptWorlds, tmp_path: Path) -> None:
    """Replicas have the same bits, which --diagnose compares."""
    plainly = (*COMMON, "--schedule", "constant", "--lr", "0.001")
    options = (*plainly, "--compression", "int8,min=8", "--diagnose", "--log-every", "5")
    name = f"{RECIPES}:CharLM64"
    train(worlds[1], name, tmp_path / "one", *plainly, "--steps", "24")
    for steps, world, more in ((12, 4, stages("1f1b")), (18, 2, ("--stages", "1")), (24, 4, stages("zerobubble"))):
        found = train(worlds[world], name, tmp_path / "parts", *options, "--steps", str(steps), "--resume", *more)
    plain = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert found["eval"]["loss"] == pytest.approx(plain["eval"]["loss"], rel=0.01)
    report = json.loads((tmp_path / "parts" / "diagnose.json").read_text())
    assert report["drift"] is None and report["last_step"] == 24


@pytest.mark.slow
def test_random_numbers_depend_on_no_cut_and_are_recomputed_alike(world2: KeptWorld, tmp_path: Path) -> None:
    """Where the model is cut is measured, and may differ from run to run."""
    for name, kind, more in (
        ("gpipe", "gpipe", ()),
        ("interleaved", "interleaved", ()),
        ("plain", "1f1b", ("--dropout", "0")),
        ("recomputed", "1f1b", ("--dropout", "0", "--recompute", "all")),
    ):
        train(world2, f"{RECIPES}:Dropping", tmp_path / name, *COMMON, *stages(kind), *more)
    assert_same(tmp_path / "gpipe", tmp_path / "interleaved", 1e-12)
    assert_same(tmp_path / "plain", tmp_path / "recomputed", 1e-12)


def test_the_recipe_says_where_to_cut(world2: KeptWorld, tmp_path: Path) -> None:
    train(world2, f"{RECIPES}:CutChain", tmp_path / "cut", *COMMON, *stages("1f1b"), "--cuts", "rest.1")
    assert "1f1b, 1 replica x 2 ranks, 4 micro-batches of 3: first..rest.1 | rest.2..rest.4" in world2.printed[0]
    for cuts, text in (
        (
            "rest.7",
            "CutChain.stages() has 'rest.7', after which the model cannot be cut; expected some of first, rest.0",
        ),
        ("first,rest.1", "returned 2 places to cut, and 2 stages need 1"),
        ("rest", "expected each place to cut once, in the order of the model"),
    ):
        assert text in refusal(world2, f"{RECIPES}:CutChain", tmp_path / "no", *stages("1f1b"), "--cuts", cuts)


@pytest.mark.slow
def test_a_straggler_is_named_with_its_stage(world2: KeptWorld, tmp_path: Path) -> None:
    options = ("--diagnose", "--steps", "20", "--log-every", "10", "--threads", "1")
    train(world2, f"{RECIPES}:SlowStage", tmp_path / "run", *options, *stages("gpipe"))
    assert re.search(r"straggler rank 1 on \S+ \(stage 1\)", world2.printed[0])


@pytest.mark.parametrize("recipe", ["Failing", *slow("Dying")])
def test_an_error_or_death_of_one_stage_ends_the_run_and_is_reported(recipe: str, tmp_path: Path) -> None:
    options = ("--run-dir", str(tmp_path / "run"), *COMMON, *stages("1f1b"))
    done = run("horovodrun", 4, [*HVDTRAIN, "train", f"{RECIPES}:{recipe}", *options])
    assert done.returncode != 0
    assert recipe == "Dying" or "Failing.score() raised ValueError: no more" in done.stdout + done.stderr


def evaluate_and_predict(folder: Path) -> dict[str, float]:
    """What `hvdtrain evaluate` finds on this world."""
    import hvdtrain
    from hvdtrain.training.evaluating import evaluate_run

    return evaluate_run(folder, "last", None, {}, hvdtrain.init()).metrics["eval"]


def test_checkpoints_are_evaluated_without_stages(worlds: KeptWorlds, tmp_path: Path) -> None:
    found = train(worlds[4], f"{RECIPES}:CharLM64", tmp_path / "run", *COMMON, "--ema", "0.9", *stages("interleaved"))
    for world in (worlds[1], worlds[2]):
        assert world.run(evaluate_and_predict, tmp_path / "run")[0] == pytest.approx(found["eval"], rel=1e-9)


@pytest.mark.slow
def test_a_killed_stage_costs_no_step(world1: KeptWorld, tmp_path: Path) -> None:
    """The last stage of the second replica dies in a step; once it is whole again, the first one of the first."""
    options = ("--threads", "1", "--kind", "adamw", "--clip-norm", "0.5", "--ema", "0.9", "--micro-batch", "3")
    name = f"{RECIPES}:Mortal"
    train(world1, name, tmp_path / "alone", *options)
    faults = ("--faults", "2:3", "--pause", "0.1", *stages("1f1b"))
    with ElasticJob(tmp_path, "localhost:4", *options, *faults, least=2, most=4, recipe=name) as job:
        job.step(3)
        job.world(4, 90)
        job.more(1)
        job.kill(0)
        job.end()
    verify(job.run_dir)
    assert_same(tmp_path / "alone", job.run_dir, 1e-9)
    assert job.summary()["membership_changes"] >= 2


REFUSED = {
    "Twice": "Twice.score calls the model a second time",
    "Keywords": "Keywords.score calls the model with input by keyword",
    "Attribute": "Attribute.score uses model.parameters",
    "Past": "Past.score uses the parameter '4.bias' apart from its call of the model",
    "Detached": "the loss of Detached.score does not depend on what the model returns",
    "Transposed": "what Transposed.score gives the model has shape (6, 6) for 2 examples",
    "Normed": "training changes the buffer '1.running_mean'",
    "Skipping": "the model of Skipping cannot be cut: 'two' is not given what 'one' returns, and nothing else",
    "Frozen": "nothing that is trained comes before the cut after '0.1'",
    "Adversarial": "Adversarial.optimizer returns several optimizers",
    "WholeNorm": "what it does to a parameter depends on the others",
    "Gathering": "Gathering.score calls collectives",
    "Ending": "Ending.evaluated is given the whole model",
    "Remembering": "Remembering.state is remembered on the first stage's rank",
}


@pytest.mark.parametrize("name", REFUSED)
def test_recipes_that_cannot_do_with_stages_are_refused(name: str, world2: KeptWorld, tmp_path: Path) -> None:
    assert REFUSED[name] in refusal(world2, f"{RECIPES}:{name}", tmp_path / "run", *stages("1f1b"))


def test_too_few_micro_batches_modules_and_ranks_are_refused(worlds: KeptWorlds, tmp_path: Path) -> None:
    name, folder = f"{RECIPES}:Dropping", tmp_path / "run"
    text = refusal(worlds[2], name, folder, *stages("1f1b"), "--micro-batch", "12")
    assert "--stages 2 needs 2 micro-batches a step at least" in text and "give --micro-batch 6 at most" in text
    assert "give a larger --batch-size" in refusal(worlds[2], name, folder, *stages("1f1b"), "--batch-size", "1")
    more = ("--stages", "4", "--pipeline-schedule", "interleaved")
    text = refusal(worlds[4], f"{RECIPES}:Chain", folder, *more)
    assert "the model of Chain is a chain of 6 modules" in text and "8 stages need as many" in text
    assert "3 ranks are no whole replicas of 2" in refusal(worlds[3], name, folder, *stages("1f1b"))
