"""A split's examples: what is refused and how, and randomness that is each example's own."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hvdtrain.system.errors import KnownError, RecipeError, RunError, UserError
from hvdtrain.torch import Recipe
from hvdtrain.torch.data import OTHER_DATA, BatchDataset, BatchRequest, check_dataset, to_device

EXPECTED = "expected a map-style dataset, with len() and [i]"


@dataclass
class Pair:
    x: torch.Tensor
    y: int


class Listed:
    """A map-style dataset of 40 examples, from a function of i."""

    def __init__(self, example: Callable[[int], Any]) -> None:
        self.example = example

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Any:
        return self.example(i)


@dataclass(kw_only=True)
class Mine(Recipe):
    def model(self) -> torch.nn.Module:
        raise NotImplementedError

    def dataset(self, split: str) -> Any:
        raise NotImplementedError

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        raise NotImplementedError

    def score(self, model: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class Padded(Mine):
    def collate(self, examples: list[Any]) -> Any:
        return torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)


def request(*ids: int, entropy: tuple[int, ...] = (0, 0)) -> BatchRequest:
    return BatchRequest(np.array(ids, dtype=np.int64), entropy)


def examples(example: Callable[[int], Any], recipe: Recipe | None = None) -> BatchDataset:
    return BatchDataset(recipe or Mine(), "train", Listed(example))


def refused(example: Callable[[int], Any], *ids: int, recipe: Recipe | None = None) -> KnownError:
    answer = examples(example, recipe)[request(*ids)]
    assert isinstance(answer, KnownError)
    assert len(str(answer).splitlines()) == 1
    return answer


def test_an_example_that_is_none_is_named() -> None:
    error = refused(lambda i: None if i == 7 else torch.ones(4), 3, 7)
    assert isinstance(error, RunError)
    assert str(error) == "Mine.dataset('train')[7] is None; expected an example"


def test_examples_of_different_sizes_are_named_with_the_way_out() -> None:
    error = refused(lambda i: torch.ones(4 if i < 30 else 5), 3, 7, 31, 4)
    assert str(error) == (
        "Mine.dataset('train')[3] and [31] do not fit into one batch (RuntimeError: stack expects each tensor to be "
        "equal size, but got [4] at entry 0 and [5] at entry 1); write Mine.collate(self, examples)"
    )
    # In a dict, in lists of different lengths, of different kinds.
    assert "[3] and [31] do not fit" in str(refused(lambda i: {"x": [1.0] * (1 + i // 30)}, 3, 31))
    assert "[3] and [31] do not fit" in str(refused(lambda i: {"x": 1.0} if i < 30 else {"y": 1.0}, 3, 31))


def test_examples_that_torch_cannot_batch_are_named_with_the_way_out() -> None:
    text = str(refused(lambda i: Pair(torch.ones(4), i), 5, 6))
    assert text.startswith("Mine.dataset('train')[5] is a Pair, which the default collation cannot batch (TypeError")
    assert text.endswith("; return arrays, tensors, numbers, tuples or dicts, or write Mine.collate(self, examples)")
    assert "[6] is a tuple, which" in str(refused(lambda i: (torch.ones(2), None if i == 6 else 1), 5, 6))


def test_a_collate_of_the_datasets_own_is_pointed_to() -> None:
    class Own(Listed):
        def collate_fn(self, given: list[Any]) -> Any:
            raise NotImplementedError

    answer = BatchDataset(Mine(), "eval", Own(lambda i: torch.ones(i)))[request(1, 2)]
    assert str(answer).endswith(
        "write Mine.collate(self, examples), which may call the dataset's collate_fn: Own.collate_fn"
    )
    assert str(answer).startswith("Mine.dataset('eval')[1] and [2]")


def test_the_recipes_collate_makes_the_batches() -> None:
    ids, batch = examples(lambda i: torch.full((i,), float(i)), Padded()).load_batch(request(1, 3))
    assert ids.tolist() == [1, 3]
    assert batch.tolist() == [[1, 0, 0], [3, 3, 3]]


def test_errors_of_the_dataset_and_of_collate_are_named() -> None:
    def broken(i: int) -> Any:
        if i == 17:
            raise ValueError("image 17 is truncated\nor worse")
        return torch.ones(2)

    error = refused(broken, 16, 17)
    assert isinstance(error, RecipeError)
    assert str(error) == "Mine.dataset('train')[17] raised ValueError: image 17 is truncated"
    assert "in broken" in error.trace
    assert "hvdtrain/torch" not in error.trace
    error = refused(lambda i: i, *range(8), recipe=Padded())
    assert str(error).startswith("Padded.collate() of dataset('train')[0, 1, 2, 3, 4] and 3 more raised TypeError: ")

    class Nothing(Mine):
        def collate(self, examples: list[Any]) -> Any:
            return None

    assert str(refused(lambda i: i, 1, recipe=Nothing())) == "Nothing.collate() returned None; expected a batch"


def test_what_is_wrong_with_the_first_examples_the_middle_and_the_last_is_known_at_the_start() -> None:
    for at in (0, 1, 7, 20, 39):
        with pytest.raises(UserError, match=rf"^Mine\.dataset\('train'\)\[{at}\] is None; expected an example$"):
            examples(lambda i, at=at: None if i == at else 1).check_examples([0, 0], 8, passed_on=False)  # type: ignore[misc]
    ragged = examples(lambda i: torch.ones(1 + i // 20))
    with pytest.raises(UserError, match=r"\[0\] and \[20\] do not fit into one batch"):
        ragged.check_examples([0, 0], 2, passed_on=False)
    ragged.check_examples([0, 0], 1, passed_on=False)  # one at a time they need not fit
    BatchDataset(Mine(), "train", [torch.ones(2)]).check_examples([0, 0], 8, passed_on=True)


@pytest.mark.parametrize(
    ("split", "dataset", "error"),
    [
        ("train", None, f"Mine.dataset('train') returned None; {EXPECTED}: does it lack a return?"),
        ("train", [], "Mine.dataset('train') is empty; expected one example at least"),
        ("eval", TensorDataset(torch.ones(0)), "Mine.dataset('eval') is empty; for no evaluation, return None"),
        (
            "train",
            DataLoader(TensorDataset(torch.ones(4))),
            "Mine.dataset('train') returned a DataLoader; return its dataset: hvdtrain makes the batches "
            f"(--batch-size), also of {OTHER_DATA}",
        ),
        ("eval", (i for i in range(3)), f"Mine.dataset('eval') returned generator; {EXPECTED}, or {OTHER_DATA}"),
        ("train", {"x": torch.ones(4)}, f"Mine.dataset('train') returned dict; {EXPECTED}"),
        ("train", 3, f"Mine.dataset('train') returned int; {EXPECTED}"),
        ("train", torch.utils.data.Dataset(), f"Mine.dataset('train') returned Dataset; {EXPECTED}"),
    ],
)
def test_what_is_not_a_dataset_is_refused(split: Any, dataset: Any, error: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_dataset(Mine(), split, dataset)
    assert str(refusal.value) == error


def test_an_iterable_dataset_is_refused_even_with_a_length() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

        def __len__(self) -> int:
            return 3

    with pytest.raises(
        UserError, match=r"^Mine.dataset\('train'\) returned Stream, an IterableDataset; expected a map-sty"
    ):
        check_dataset(Mine(), "train", Stream())


def test_what_has_a_length_and_items_is_a_dataset() -> None:
    for dataset in ([1], (1, 2), np.ones(3), torch.ones(3), range(3), TensorDataset(torch.ones(3))):
        check_dataset(Mine(), "train", dataset)
    check_dataset(Mine(), "eval", None)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_an_examples_randomness_is_its_own() -> None:
    """Of its id, seed and epoch; not of the batch, or of what was drawn before."""
    drawn = examples(lambda i: torch.tensor(draw()))
    together = drawn.load_batch(request(1, 2, 3))[1].tolist()
    alone = [drawn.load_batch(request(i))[1][0].tolist() for i in (3, 2, 1)]
    assert together == alone[::-1]
    assert len({value for row in together for value in row}) == 9
    assert drawn.load_batch(request(1, entropy=(0, 1)))[1].tolist() != together[:1]
    assert drawn.load_batch(request(1, entropy=(1, 0)))[1].tolist() != together[:1]


def test_what_collate_draws_belongs_to_the_batch() -> None:
    class Masked(Mine):
        def collate(self, examples: list[Any]) -> Any:
            return torch.tensor([draw() for _ in examples])

    seen: list[int] = []
    once = examples(lambda i: seen.append(i) or (draw() if seen.count(i) == 1 else 0), Masked())  # draws if not cached
    first = once.load_batch(request(1, 2))[1].tolist()
    assert once.load_batch(request(1, 2))[1].tolist() == first
    assert once.load_batch(request(3, 2))[1].tolist() != first


def test_batches_of_any_kind_are_moved() -> None:
    class Graph:
        device = "cpu"

        def to(self, device: torch.device) -> str:
            return f"on {device}"

    meta = torch.device("meta")
    moved = to_device(
        {"pair": Pair(torch.ones(4), 7), "rest": [(torch.ones(2), "text"), Graph()]}, meta, torch.preserve_format
    )
    assert moved["pair"].x.device == meta
    assert moved["pair"].y == 7
    assert moved["rest"][0][0].device == meta
    assert moved["rest"][0][1] == "text"
    assert moved["rest"][1] == "on meta"


def test_a_batch_that_loader_processes_cannot_pass_on_is_refused_at_the_start() -> None:
    """Their queue would print a traceback and drop it, and the rank wait for ever."""

    class Lazy(Mine):
        def collate(self, examples: list[Any]) -> Any:
            return (example for example in examples)

    drawn = examples(float, Lazy())
    drawn.check_examples([0, 0], 8, passed_on=False)
    with pytest.raises(UserError) as refusal:
        drawn.check_examples([0, 0], 8, passed_on=True)
    assert str(refusal.value).startswith(
        "Lazy.collate() returned a batch that a loader process cannot pass on (TypeError"
    )
    assert str(refusal.value).endswith("; return what can be pickled, or load without such processes (--workers 0)")


def test_a_full_shared_memory_is_not_taken_for_examples_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(examples: list[Any]) -> Any:
        raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(Mine, "stack_examples", staticmethod(fail))
    assert str(refused(float, 1, 2)).startswith("/dev/shm on ")


def test_an_id_that_comes_again_in_an_epoch_draws_other_numbers() -> None:
    drawing = examples(lambda i: torch.rand(()))
    whole = BatchRequest(np.array([3, 3, 3]), (0, 0), first_place=7)
    _, drawn = drawing.load_batch(whole)
    assert len(set(drawn.tolist())) == 3
    part = BatchRequest(np.array([3]), (0, 0), first_place=8)  # whichever rank loads it
    assert drawing.load_batch(part)[1].item() == drawn[1].item()
