"""A recipe's `sampler`: the order of an epoch, the same on any number of ranks and through a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hvdtrain.ledger.verify import verify_ledger
from hvdtrain.recipe.given_order import GivenOrder, decode_file, encode_file, read_given_order
from hvdtrain.system.errors import UserError
from tests.ranks.elastic import ElasticJob, verify
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

SAMPLED = str(Path(__file__).parent / "sampled_recipe.py")
RECIPE = """
from dataclasses import dataclass
import torch
from torch.utils.data import TensorDataset
from hvdtrain.torch import Recipe, option

@dataclass(kw_only=True)
class Sampled(Recipe):
    "Learns nothing, and reports which of 100 examples it was given."
    kind: str = option("balanced", "what the sampler returns")
    epochs: int = 2
    batch_size: int = 16

    def model(self):
        return torch.nn.Linear(1, 1, dtype=torch.float64)

    def dataset(self, split):
        return TensorDataset(torch.arange(100 if split == "train" else 30, dtype=torch.float64))

    def sampler(self, split, epoch):
        assert split == "train" and self.now.epoch == epoch and self.now.training
        classes = torch.where(torch.arange(100) < 5, 0, 1)
        if self.kind == "balanced":
            return 1 / torch.bincount(classes)[classes]
        if self.kind == "drawn":
            return torch.randperm(100)[:50]
        if self.kind == "named":
            return torch.utils.data.SequentialSampler(range(70))
        if self.kind == "odd epochs":
            return None if epoch % 2 == 0 else torch.arange(99, -1, -1)
        return eval(self.kind)

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=0.01)

    def score(self, model, batch):
        (ids,) = batch
        rare, digits = (ids < 5).double(), ids * 1000.0 + ids**2
        return {"loss": (model(ids[:, None] / 100)[:, 0] - 1) ** 2, "rare": rare, "ids": ids, "digits": digits}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "sampled.py").write_text(RECIPE)
    return str(tmp_path / "sampled.py")


def fed(run_dir: Path) -> list[tuple[float, float]]:
    """What tells apart which ids each step was given."""
    return [(row["ids"], row["digits"]) for row in rows(run_dir)]


def test_weights_balance_classes_by_the_same_draws_on_any_number_of_ranks(
    tmp_path: Path, recipe: str, worlds: KeptWorlds
) -> None:
    weights = np.array([1 / 5] * 5 + [1 / 95] * 95, np.float32).astype(np.float64)
    drawn = np.concatenate([GivenOrder("weights", weights).list_ids(0, epoch) for epoch in (0, 1)])
    assert abs((drawn < 5).mean() - 0.5) < 0.12  # 4 standard deviations of 200 draws
    expected = [batch for epoch in np.split(drawn, 2) for batch in np.split(epoch, range(16, 100, 16))]
    for ranks in (1, 2, 3):
        train(worlds[ranks], recipe, tmp_path / f"{ranks}", "--log-every", "1", "--micro-batch", "3")
        seen = rows(tmp_path / f"{ranks}")
        assert [row["rare"] for row in seen] == [(batch < 5).mean() for batch in expected]
        assert [row["ids"] for row in seen] == pytest.approx([batch.mean() for batch in expected])
        verdict = verify_ledger(tmp_path / f"{ranks}")
        assert verdict.format_lines() == ["as ordered: 2 epochs x 100 examples, 14 steps (1 segment)"]
        assert not verdict.is_exactly_once
    assert len(list((tmp_path / "3" / "ledger").glob("weights-*.npz"))) == 1


def test_ids_are_an_order_of_any_length_that_a_resume_in_mid_epoch_continues(
    tmp_path: Path, recipe: str, worlds: KeptWorlds
) -> None:
    options = ("--kind", "drawn", "--log-every", "1", "--deterministic")
    summary = train(worlds[1], recipe, tmp_path / "whole", *options)
    assert (summary["steps"], summary["samples_seen"]) == (8, 100)
    train(worlds[2], recipe, tmp_path / "parts", *options, "--steps", "6")
    train(worlds[3], recipe, tmp_path / "parts", "--resume", "--steps", "8")
    assert fed(tmp_path / "parts") == fed(tmp_path / "whole")
    (line,) = verify_ledger(tmp_path / "parts").format_lines()
    assert line == "as ordered: 2 epochs x 50 examples, 8 steps (2 segments)"


def test_without_a_ledger_a_resume_calls_the_sampler_again_and_compares(
    tmp_path: Path, recipe: str, world2: KeptWorld
) -> None:
    options = ("--kind", "drawn", "--log-every", "1", "--no-ledger", "--deterministic")
    train(world2, recipe, tmp_path / "whole", *options)
    train(world2, recipe, tmp_path / "parts", *options, "--steps", "6")
    Path(recipe).write_text(RECIPE.replace("randperm(100)", "randperm(99)"))
    text = refusal(world2, recipe, tmp_path / "parts", "--resume", "--steps", "8")
    assert text == (
        "cannot resume at example 32 of an epoch: Sampled.sampler gives another order now, and the ledger does not "
        "have the one of then; resume from a checkpoint at the end of an epoch, or with the original data and sampler"
    )
    Path(recipe).write_text(RECIPE)
    train(world2, recipe, tmp_path / "parts", "--resume", "--steps", "8")
    assert fed(tmp_path / "parts") == fed(tmp_path / "whole")


@pytest.mark.slow
def test_a_lost_rank_takes_no_order_with_it(tmp_path: Path) -> None:
    """Each epoch's order is drawn from nowhere: no other process could draw it again."""
    with ElasticJob(tmp_path, "localhost:2", "--pause", "0.3", "--epochs", "16", recipe=SAMPLED) as job:
        job.step(2)
        job.kill(0)
        job.world(1)
        job.world(2)
        job.more(2)
        job.end()
    verify(job.run_dir, "as ordered: 16 epochs x 640 examples, 80 steps")


def test_a_damaged_file_of_an_order_is_a_finding(tmp_path: Path, recipe: str, world1: KeptWorld) -> None:
    train(world1, recipe, tmp_path / "run", "--kind", "odd epochs")
    assert verify_ledger(tmp_path / "run").format_lines()[0].startswith("as ordered: 2 epochs x 100 examples")
    (kept,) = (tmp_path / "run" / "ledger").glob("ids-*.npz")
    kept.write_bytes(encode_file(GivenOrder("ids", np.arange(100))))
    lines = verify_ledger(tmp_path / "run").format_lines()
    assert lines[0].startswith("not as ordered")
    assert lines[1].startswith(f"{kept} has other contents than its name says (ids-")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("torch.ones(99)", " returned 99 weights; expected 100, one for each example (ids are integers: their"),
        ("[-1.0] * 100", "[0] is -1; expected a weight that is finite and not negative"),
        ("torch.zeros(100)", ": the weights add up to 0; expected a positive, finite sum"),
        ("[3, 100]", "[1] is 100; expected an id from 0 to 99"),
        ("[]", " is empty; expected float weights, one for each example, or integer ids"),
        ("[[1], [2]]", " returned list (int64 of shape (2, 1)); expected float weights, one for each example, or"),
        ("torch.arange(50 + 2 * epoch)", " gives 52 examples, the epochs before had 50; give equally many in each"),
    ],
)
def test_what_is_no_order_is_refused(tmp_path: Path, recipe: str, world2: KeptWorld, kind: str, text: str) -> None:
    epoch = 1 if "epoch" in kind else 0
    assert refusal(world2, recipe, tmp_path / "run", "--kind", kind).startswith(
        f"Sampled.sampler('train', {epoch}){text}"
    )


def test_a_sampler_of_torch_is_an_order(tmp_path: Path, recipe: str, world1: KeptWorld) -> None:
    train(world1, recipe, tmp_path / "run", "--kind", "named", "--log-every", "1", "--batch-size", "35")
    assert [row["ids"] for row in rows(tmp_path / "run")] == [17, 52, 17, 52]


def test_an_order_survives_its_file() -> None:
    for given in (torch.tensor([0.5, 2.0, 0.0]), np.array([2, 0, 1, 2])):
        order = read_given_order(given, "sampler()", 3)
        again = decode_file(encode_file(order))
        assert (again.kind, again.key) == (order.kind, order.key)
        assert np.array_equal(again.list_ids(1, 2), order.list_ids(1, 2))
    with pytest.raises(ValueError, match="is not a valid order"):
        decode_file(b"PK")
    with pytest.raises(UserError):
        read_given_order(["a"], "sampler()", 3)


def test_draws_follow_the_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    counts = np.zeros(6)
    for epoch in range(4000):
        counts += np.bincount(GivenOrder("weights", weights).list_ids(7, epoch), minlength=6)
    assert counts[[0, 3, 5]].tolist() == [0, 0, 0]
    assert counts / counts.sum() == pytest.approx(weights / 8, abs=0.012)  # 4 standard deviations
