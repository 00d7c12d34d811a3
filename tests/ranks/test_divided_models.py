"""--tensor and --shard model: the ranks of a replica hold the model together, and training is the same as without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hvdtrain.system.errors import UserError
from hvdtrain.training.options import check_elastic_options
from tests.ranks import divided_recipes
from tests.ranks.harness import rows
from tests.ranks.test_sharded_optimizer import assert_same
from tests.support.slow_cases import slow
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

RECIPES = Path(__file__).parent / "divided_recipes.py"
DIVIDED, OUTPUTS = f"{RECIPES}:Divided", f"{RECIPES}:Outputs"
TENSOR, SHARD = ("--tensor", "2"), ("--shard", "model", "--shard-ranks", "2")
WAYS = pytest.mark.parametrize("way", [TENSOR, SHARD], ids=["tensor", "shard"])
# What is the same code for both.
ONE_WAY = pytest.mark.parametrize("way", [TENSOR, *slow((SHARD,))], ids=["tensor", "shard"])
BOTH = ("--threads", "1", "--log-every", "1")
SMALL = ("--width", "16", "--batch-size", "6")


def train_both(worlds: KeptWorlds, recipe: str, folder: Path, way: tuple[str, ...], *options: str) -> None:
    """Train on one rank, and on 2 x 2."""
    train(worlds[1], recipe, folder / "alone", *BOTH, *options)
    train(worlds[4], recipe, folder / "divided", *BOTH, *options, *way)


@WAYS
def test_two_replicas_of_two_ranks_train_as_one_rank(way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path) -> None:
    """Batches of 6, 6 and 1 examples in micro-batches: three ranks of four have none of the last."""
    options = ("--kind", "adamw", "--clip-norm", "0.5", "--ema", "0.9", "--micro-batch", "1", "--diagnose")
    train_both(worlds, DIVIDED, tmp_path, way, *options)
    assert_same(tmp_path / "alone", tmp_path / "divided", 1e-10)
    pairs = list(zip(rows(tmp_path / "alone"), rows(tmp_path / "divided"), strict=True))
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name in one.keys() & {"loss", "gradient_norm", "eval_loss"}:
            assert other[name] == pytest.approx(one[name], rel=1e-10, abs=1e-10), name
    assert max(one["gradient_norm"] for one, _ in pairs if "gradient_norm" in one) > 0.5, "the clipping must bite"
    flag = " ".join(way[:2])
    assert f"grid      2 replicas of 2 ranks each ({flag})" in worlds[4].printed[0]
    assert f" parameters on each rank ({flag})" in worlds[4].printed[0]


@ONE_WAY
def test_float32_follows_one_rank_step_by_step(way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path) -> None:
    train_both(worlds, DIVIDED, tmp_path, way, "--dtype", "float32")
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "divided"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
@WAYS
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp: str, way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path) -> None:
    """fp16's first loss scales overflow, perhaps on one rank only: all skip the step."""
    train_both(worlds, DIVIDED, tmp_path, way, "--dtype", "float32", "--amp", amp, "--clip-norm", "1")
    for one, other in zip(rows(tmp_path / "alone"), rows(tmp_path / "divided"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert other.get("loss_scale") == one.get("loss_scale")


@ONE_WAY
@pytest.mark.parametrize(
    ("compression", "near"),
    [("int8,min=8", 0.02), *slow(("powersgd:2,min=8,warmup=0", 0.4))],
)
def test_compression_between_replicas(
    compression: str, near: float, way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path
) -> None:
    """Ranks at the same place have the same bits; of what is not split, all have."""
    options = ["--compression", compression, "--dtype", "float32", "--diagnose", "--epochs", "3"]
    train(worlds[4], DIVIDED, tmp_path / "run", *BOTH, *way, *options, env={"HVDTRAIN_TEST_OUT": str(tmp_path)})
    found = [torch.load(tmp_path / f"held{rank}") for rank in range(4)]
    for number, is_split in enumerate(found[0]["split"]):
        held = [one["held"][number] for one in found]
        assert torch.equal(held[0], held[2])
        assert torch.equal(held[1], held[3])
        assert is_split or torch.equal(held[0], held[1])
    assert sum(found[0]["split"]) == (len(found[0]["split"]) if way == SHARD else 6)
    train(worlds[1], DIVIDED, tmp_path / "alone", *BOTH, *options)
    first, *_, last = (row["loss"] for row in rows(tmp_path / "run") if "loss" in row)
    *_, expected = (row["loss"] for row in rows(tmp_path / "alone") if "loss" in row)
    assert last == pytest.approx(expected, rel=near)
    assert last < first


def test_each_rank_has_its_share_of_parameters_and_state(worlds: KeptWorlds, tmp_path: Path) -> None:
    """AdamW in float64 has 16 bytes of state for each value; FSDP2 divides the rows of each parameter."""
    model = divided_recipes.Network()
    for way, is_split in (
        (SHARD, lambda name: True),
        (TENSOR, lambda name: ".up." in name or name.endswith("down.weight")),
    ):
        env = {"HVDTRAIN_TEST_OUT": str(tmp_path)}
        train(worlds[4], DIVIDED, tmp_path / way[0], *BOTH, *way, "--kind", "adamw", "--steps", "2", env=env)
        values = [p.numel() for name, p in model.named_parameters() if not is_split(name)] * 2
        split = [p for name, p in model.named_parameters() if is_split(name)]
        for rank in (0, 1):
            rows_of = [p.shape[0] // 2 + (p.shape[0] % 2) * (rank == 0) for p in split]
            expected = sum(values) // 2 + sum(n * p.numel() // p.shape[0] for n, p in zip(rows_of, split, strict=True))
            held = torch.load(tmp_path / f"held{rank}")
            assert sum(t.numel() for t in held["held"]) == expected
            assert held["state_bytes"] == 16 * expected


def test_runs_resume_in_other_layouts(worlds: KeptWorlds, tmp_path: Path) -> None:
    options = ["--kind", "adamw", "--checkpoint-every", "1", "--threads", "1", "--ema", "0.9"]
    train(worlds[1], DIVIDED, tmp_path / "alone", *options, "--steps", "9")
    folder = tmp_path / "run"
    train(worlds[4], DIVIDED, folder, *options, "--steps", "2", *TENSOR)
    alone = ("--tensor", "1", "--shard", "none", "--shard-ranks", "0")
    of_four = ("--shard", "model", "--shard-ranks", "4")
    for ranks, steps, way in ((1, 4, alone), (4, 6, SHARD), (2, 7, alone), (4, 8, of_four), (4, 9, (*alone, *TENSOR))):
        resumed = train(worlds[ranks], DIVIDED, folder, "--resume", "--steps", str(steps), *way)
        assert resumed["steps"] == steps
    assert_same(tmp_path / "alone", folder, 1e-10)


@ONE_WAY
def test_outputs_may_be_computed_in_loops_of_any_length(
    way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path
) -> None:
    """By methods of the model's parts, of five examples on four ranks."""
    train_both(worlds, OUTPUTS, tmp_path, way, "--ema", "0.5")
    found = [
        [row["eval_squares"] for row in rows(tmp_path / name) if "eval_squares" in row] for name in ("alone", "divided")
    ]
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@ONE_WAY
def test_runs_begin_with_weights_of_a_file(way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path) -> None:
    train(worlds[1], DIVIDED, tmp_path / "first", "--threads", "1", "--steps", "3", "--kind", "adamw")
    weights = ("--init-from", str(tmp_path / "first" / "checkpoints" / "step-3"), "--steps", "2", "--ema", "0.5")
    train_both(worlds, DIVIDED, tmp_path, way, *weights)
    assert_same(tmp_path / "alone", tmp_path / "divided", 1e-10)


@pytest.mark.slow
@WAYS
def test_an_optimizer_with_a_state_from_the_start(way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path) -> None:
    train_both(worlds, DIVIDED, tmp_path, way, "--kind", "adagrad", "--steps", "3")
    assert_same(tmp_path / "alone", tmp_path / "divided", 1e-10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tensor", "2", "--shard", "model"], "--tensor 2 with --shard model: ranks divide the model already"),
        (["--shard-ranks", "2"], "--shard-ranks 2 without --shard model"),
        ([*SHARD, "--deterministic"], "--shard model with --deterministic: "),
        ([*TENSOR, "--compile"], "--tensor 2 with --compile: "),
        ([*SHARD, "--exchange", "horovod"], "--shard model with --exchange horovod"),
        ([*TENSOR, "--local-steps", "4"], "--tensor 2 with --local-steps 4: "),
        ([*SHARD, "--prune", "0.5,from:1,to:3"], "--shard model with --prune 0.5,from:1,to:3: "),
        ([*TENSOR, "--shares", "1:1"], "--tensor 2 with --shares 1:1: "),
        ([*SHARD, "--compression", "auto"], "--shard model with --compression auto: "),
        ([*TENSOR, "--sync-batchnorm"], "--tensor 2 with --sync-batchnorm: "),
        ([*SHARD, "--checkpoint-residuals", "exact"], "--shard model with --checkpoint-residuals exact: "),
        (["--tensor", "3"], "--tensor 3: 2 ranks are no whole replicas of 3 ranks each"),
        (
            [*SHARD, "--kind", "adafactor"],
            "Divided.optimizer: Adafactor updates a parameter as a whole, of which a rank",
        ),
        ([*TENSOR, "--kind", "adafactor"], "leave out --tensor 2"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(options: list[str], text: str, world2: KeptWorld, tmp_path: Path) -> None:
    found = refusal(world2, DIVIDED, tmp_path / "run", *options)
    assert text in found and "\n" not in found
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "way", "text"),
    [
        ("Freezes", SHARD, "--shard model: first.weight was frozen after the training began; decide in model()"),
        ("NoGraph", SHARD, "--shard model: the loss of this rank's examples depends on no parameter"),
        ("Norm", TENSOR, "--tensor 2: 'norm' is a BatchNorm1d, whose statistics would be of other examples"),
        ("Plain", TENSOR, "--tensor 2: Plain has no method split_plan(self), which returns torch's ParallelStyle"),
        ("Plain", SHARD, "--shard model: Plain has no method blocks(self, model), which returns the model's blocks"),
        ("Unknown", TENSOR, "Unknown.split_plan(): no module of the model is named 'layers.*'"),
        ("NoStyle", TENSOR, "NoStyle.split_plan()['first'] is 'column'; expected a torch.distributed ParallelStyle"),
        ("Odd", TENSOR, "Odd.split_plan(): last.weight, (1, 6), cannot be split into 2 equal parts"),
        ("NothingSplit", TENSOR, "NothingSplit.split_plan() splits no parameter of the model"),
        (
            "Several",
            SHARD,
            "--shard model takes one optimizer, and there is one for each of loss_a, loss_b",
        ),
        ("Calls", SHARD, "Calls.score() calls collectives, which --shard model refuses"),
        ("Tied", SHARD, "is a parameter of the block 'blocks.1' too: return blocks that share none"),
        ("Gathers", SHARD, "Gathers.score calls all_gather, which --shard model refuses"),
        ("Methods", SHARD, "Methods.score() uses parameters outside of the model's calls, where --shard model divides"),
    ],
)
def test_recipes_that_cannot_be_divided_are_refused(
    name: str, way: tuple[str, ...], text: str, world2: KeptWorld, tmp_path: Path
) -> None:
    found = refusal(world2, f"{RECIPES}:{name}", tmp_path / "run", *way)
    assert text in found and "\n" not in found
    assert (tmp_path / "run").exists() == (name in ("Freezes", "NoGraph"))  # which is seen later


@pytest.mark.parametrize(
    ("recipe", "options", "ways"),
    [
        ("digits", ["--width", "6", "--lr", "0.02", "--batch-size", "10"], [SHARD]),
        *slow(("charlm", [*SMALL, "--files", "10", "--context", "16"], [SHARD, TENSOR])),
        pytest.param(
            f"{RECIPES}:WithoutBleu",
            [*SMALL, "--layers", "1", "--dropout", "0"],
            [SHARD, TENSOR],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["digits", "charlm", "translate"],
)
def test_shipped_recipes(
    recipe: str, options: list[str], ways: list[tuple[str, ...]], worlds: KeptWorlds, tmp_path: Path
) -> None:
    options = [*options, "--steps", "4", "--eval-every", "9"]
    train(worlds[1], recipe, tmp_path / "alone", *BOTH, *options)
    losses = [row["loss"] for row in rows(tmp_path / "alone") if "loss" in row]
    for way in ways:
        train(worlds[4], recipe, tmp_path / way[0], *BOTH, *options, *way)
        found = [row["loss"] for row in rows(tmp_path / way[0]) if "loss" in row]
        assert found == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", [("--stages", "2"), SHARD, TENSOR], ids=["stages", "shard", "tensor"])
def test_compression_costs_no_accuracy(way: tuple[str, ...], worlds: KeptWorlds, tmp_path: Path) -> None:
    """Digits on two replicas of two: what is trained with a codec is as good as with one of three seeds without.

    Two standard errors are allowed for: an accuracy of 0.96, measured with 360 examples, has one of 0.01.
    """
    recipe, options = f"{RECIPES}:SplitDigits", ("--epochs", "12", "--threads", "1", *way)

    def find_accuracy(*more: str) -> float:
        folder = tmp_path / "-".join(more).replace("/", "")
        return float(train(worlds[4], recipe, folder, *options, *more, timeout=300)["eval"]["accuracy"])

    found = [find_accuracy("--seed", str(seed)) for seed in range(3)]
    error = (0.96 * 0.04 / 360) ** 0.5
    compressed = {codec: find_accuracy("--compression", codec) for codec in ("int8", "powersgd:2")}
    for codec, accuracy in compressed.items():
        assert min(found) - 2 * error <= accuracy <= max(found) + 2 * error, (codec, accuracy, found)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"shard": "model"}, "--shard model in an elastic run: .*add --shard-ranks N"),
        ({"shard": "model", "shard_ranks": 2, "amp": "fp16"}, "--shard model with --amp fp16: .*use bf16"),
        ({"tensor": 2, "amp": "fp16"}, "--tensor 2 with --amp fp16: .*use bf16"),
    ],
)
def test_elastic_runs_refuse_what_is_not_exact(given: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        check_elastic_options(given)


@pytest.mark.parametrize("given", [{"tensor": 2}, {"shard": "model", "shard_ranks": 2, "compression": "int8"}])
def test_elastic_runs_take_them(given: dict[str, object]) -> None:
    check_elastic_options(given)
