"""Data that is no list, on several ranks: lines of a file, streams, rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvdtrain.ledger.verify import verify_ledger
from tests.ranks.harness import rows
from tests.support.worlds import KeptWorld, KeptWorlds, refusal, train

HEAD = """
import itertools
from dataclasses import dataclass
from pathlib import Path
import torch
from hvdtrain.data import Lines, Rollouts, Stream
from hvdtrain.torch import Recipe, option

@dataclass(kw_only=True)
class Base(Recipe):
    "A line through numbers; reports which ones a step was given."
    epochs: int = 2
    batch_size: int = 6
    lr: float = 0.01
    folder: str = option("", "where files are")

    def model(self):
        self.net = torch.nn.Linear(1, 1, dtype=torch.float64)
        return self.net

    def optimizer(self, params):
        return torch.optim.SGD(params, lr=self.lr)

    def collate(self, examples):
        return torch.tensor([float(example) for example in examples], dtype=torch.float64)

    def score(self, model, batch):
        assert torch.is_tensor(batch)
        return {"loss": (model(batch[:, None] / 20)[:, 0] - 1) ** 2, "number": batch, "square": batch**2}

@dataclass(kw_only=True)
class Mine(Base):
    "For a test."
"""


def write(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(HEAD + body)
    return str(path)


def numbers(run_dir: Path) -> list[tuple[float, float]]:
    """What each step was given: the mean of its numbers, and of their squares."""
    return [(row["number"], row["square"]) for row in rows(run_dir)]


def means(batches: list[list[int]]) -> list[tuple[float, float]]:
    return [(sum(batch) / len(batch), sum(n * n for n in batch) / len(batch)) for batch in batches]


def test_each_line_of_a_file_comes_once_on_several_ranks(tmp_path: Path, worlds: KeptWorlds) -> None:
    recipe = write(
        tmp_path, "    def dataset(self, split):\n        return Lines(Path(self.folder) / f'{split}.txt')\n"
    )
    (tmp_path / "train.txt").write_text("".join(f"{i}\n" for i in range(20)))
    (tmp_path / "eval.txt").write_text("1\n2\n6")
    options = ("--folder", str(tmp_path), "--log-every", "1", "--deterministic")
    for ranks, workers in ((1, "0"), (2, "1"), (3, "0")):
        summary = train(worlds[ranks], recipe, tmp_path / f"{ranks}", *options, "--workers", workers)
        assert summary["eval"]["number"] == 3
        assert numbers(tmp_path / f"{ranks}") == numbers(tmp_path / "1")
        assert verify_ledger(tmp_path / f"{ranks}").format_lines()[0].startswith("exactly once: 2 epochs x 20 examples")
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".eval.txt.lines", ".train.txt.lines"]


def test_a_whole_stream_is_the_same_training_on_any_number_of_ranks(tmp_path: Path, worlds: KeptWorlds) -> None:
    recipe = write(
        tmp_path,
        "    evals = ()\n"
        "    def dataset(self, split):\n"
        "        return Stream(lambda: (i + torch.rand(()).item() for i in range(17)), 10)\n",
    )
    options = ("--log-every", "1", "--deterministic")
    train(worlds[1], recipe, tmp_path / "whole", *options, "--epochs", "3")
    whole = numbers(tmp_path / "whole")
    # Steps of 6 and 4; the stream of 17 is begun again in the fourth, whatever an epoch is.
    expected = means([[*range(6)], [*range(6, 10)], [*range(10, 16)], [16, 0, 1, 2], [*range(3, 9)], [*range(9, 13)]])
    assert [round(number - mean - 0.5) for (number, _), (mean, _) in zip(whole, expected, strict=True)] == [0] * 6
    train(worlds[2], recipe, tmp_path / "parts", *options, "--steps", "3", "--workers", "1")
    assert "of a stream that every rank reads, no ledger" in worlds[2].printed[0]
    train(worlds[3], recipe, tmp_path / "parts", "--resume", "--steps", "6", "--workers", "0")
    assert numbers(tmp_path / "parts") == [pytest.approx(step, rel=1e-12) for step in whole]
    assert not (tmp_path / "parts" / "ledger").exists()


DIVIDED = """
    parts: str = "rank, size"

    def dataset(self, split):
        count = {"rank, size": lambda rank, size: itertools.count(rank, size),
                 "offset": lambda rank, size, offset: itertools.count(rank + size * offset, size)}
        return Stream(count[self.parts]) if split == "train" else None
"""


def test_each_rank_reads_its_part_of_a_stream_of_unknown_length(tmp_path: Path, world2: KeptWorld) -> None:
    recipe = write(tmp_path, DIVIDED)
    expected = means([[*range(first, first + 6)] for first in range(0, 36, 6)])
    for parts in ("rank, size", "offset"):
        folder = tmp_path / parts[:4]
        train(world2, recipe, folder, "--parts", parts, "--steps", "4", "--log-every", "1", "--batch-size", "6")
        assert "data      examples of a stream, each rank its part, no ledger, of unknown length" in world2.printed[0]
        train(world2, recipe, folder, "--resume", "--steps", "6")
        assert numbers(folder) == expected
        assert json.loads((folder / "checkpoints" / "step-6" / "meta.json").read_text())["position"]["samples"] == 36


def test_what_a_stream_cannot_do_is_refused_by_name(tmp_path: Path, worlds: KeptWorlds) -> None:
    recipe, run, world2 = write(tmp_path, DIVIDED), tmp_path / "run", worlds[2]
    text = "the training data is a Stream of unknown length: give it examples_per_epoch, or add --steps N"
    assert refusal(world2, recipe, run) == text
    text = refusal(world2, recipe, run, "--steps", "4", "--schedule", "warmup:1ep cosine")
    assert "counts epochs, and the training data is a Stream of unknown length" in text
    whole = "let its factory take no arguments, so that every rank reads all of it"
    text = "each rank reads its part of the Stream, so training depends on their number; "
    assert refusal(world2, recipe, run, "--steps", "4", "--deterministic") == text + whole
    train(world2, recipe, run / "again", "--steps", "4")
    text = "cannot resume with 3 ranks, batches of 6: the parts of the Stream were read with 2 ranks, batches of 6; "
    assert refusal(worlds[3], recipe, run / "again", "--resume", "--steps", "6") == text + whole
    sampled = write(tmp_path, DIVIDED + "\n    def sampler(self, split, epoch):\n        return [0]\n")
    text = "Mine has a sampler and a Stream, whose examples have no numbers to give an order of: leave out one of them"
    assert refusal(world2, sampled, run, "--steps", "4") == text
    evaluated = write(tmp_path, "    def dataset(self, split):\n        return Stream(lambda: [1, 2])\n")
    assert refusal(world2, evaluated, run, "--steps", "4").endswith(
        "Mine.dataset('eval') returned a Stream; expected a map-style dataset, with len() and [i]: an evaluation "
        "scores each example once"
    )


ROLLOUTS = """
    def dataset(self, split):
        return Rollouts(self.play, 10 if split == "train" else 4)

    def play(self, now, i):
        assert now == self.now
        weight = self.net.weight.item() if now.training else 0
        return 10 * now.step + i + torch.rand((), dtype=torch.float64).item() + weight
"""


def test_rollouts_are_the_same_on_any_number_of_ranks(tmp_path: Path, worlds: KeptWorlds) -> None:
    recipe = write(tmp_path, ROLLOUTS)
    options = ("--log-every", "1", "--deterministic", "--micro-batch", "1", "--eval-every", "1")
    for ranks in (1, 2, 3):
        train(worlds[ranks], recipe, tmp_path / f"{ranks}", *options)
        for here, alone in zip(list_metrics(tmp_path / f"{ranks}"), list_metrics(tmp_path / "1"), strict=True):
            assert here == pytest.approx(alone, rel=1e-12)  # sums are added in another order
    first, second = numbers(tmp_path / "1")[:2]
    assert 2 < first[0] < 5 and 10 < second[0] < 13  # 2.5 and 11.5, each with its draw and the weight
    train(worlds[2], recipe, tmp_path / "parts", *options, "--steps", "3")
    train(worlds[1], recipe, tmp_path / "parts", "--resume", "--steps", "4")
    assert list_metrics(tmp_path / "parts")[-1] == pytest.approx(list_metrics(tmp_path / "1")[-1], rel=1e-12)
    assert verify_ledger(tmp_path / "2").format_lines()[0].startswith("exactly once: 2 epochs x 10 examples")


def list_metrics(run_dir: Path) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in ("loss", "number", "square", "eval_number")) for row in rows(run_dir)]


def test_rollouts_refuse_loader_processes(tmp_path: Path, world2: KeptWorld) -> None:
    text = refusal(world2, write(tmp_path, ROLLOUTS), tmp_path / "run", "--workers", "1")
    assert text == (
        "Mine.dataset('train') is a Rollouts, whose examples are made by the model in the training process: leave out "
        "--workers"
    )


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (
            "torch.utils.data.DataLoader([1, 2])",
            "returned a DataLoader; return its dataset: hvdtrain makes",
        ),
        ("Endless()", "returned Endless, an IterableDataset; expected a map-style dataset, with len() and [i], or"),
    ],
)
def test_an_iterable_dataset_is_refused_with_what_to_return_instead(
    tmp_path: Path, world1: KeptWorld, returned: str, text: str
) -> None:
    body = f"    def dataset(self, split):\n        return {returned}\n"
    body += "class Endless(torch.utils.data.IterableDataset):\n    def __iter__(self):\n        return iter(())\n"
    found = refusal(world1, write(tmp_path, body), tmp_path / "run")
    assert found.startswith(f"Mine.dataset('train') {text}")
    assert all(f"hvdtrain.data.{name} (" in found for name in ("Lines", "Stream", "Rollouts")) and "\n" not in found


NOW = """
    def dataset(self, split):
        recipe = self

        class Told:
            def __len__(self):
                return 10 if split == "train" else 3

            def __getitem__(self, i):
                now = recipe.now
                return 1000 * (not now.training) + 100 * now.epoch + now.step + now.samples / 1000

        return Told()
"""


def test_loader_processes_know_the_step_that_they_load_for(tmp_path: Path, worlds: KeptWorlds) -> None:
    """Also where they load ahead of it."""
    recipe = write(tmp_path, NOW)
    for ranks, workers in ((1, "0"), (1, "2"), (2, "1")):
        run_dir = tmp_path / f"{ranks}-{workers}"
        summary = train(worlds[ranks], recipe, run_dir, "--workers", workers, "--log-every", "1", "--batch-size", "4")
        told = [0, 1.004, 2.008, 103.01, 104.014, 105.018]
        assert [row["number"] for row in rows(run_dir)] == pytest.approx(told)
        assert summary["eval"]["number"] == pytest.approx(1000 + 200 + 6 + 0.02)
