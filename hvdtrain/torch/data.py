"""A split's examples: checked, drawn with randomness of their own, and put into batches."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hvdtrain.data.rollouts import Rollouts
from hvdtrain.data.stream import Stream
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.recipe.framework import Split
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.order import Ids
from hvdtrain.system.errors import KnownError, RunError, UserError
from hvdtrain.system.recipe_errors import describe_error, in_recipe, name_call
from hvdtrain.system.seeds import derive_seed
from hvdtrain.system.shared_memory import explain_full_shared_memory

NUM_CHECKED_EXAMPLES = 8  # examples that are looked at before training, with the middle and the last one
OTHER_DATA = (
    "hvdtrain.data.Lines (a file's lines), hvdtrain.data.Stream (an iterable) or hvdtrain.data.Rollouts (played by the "
    "model)"
)
MAX_IDS_SHOWN = 5  # ids in a message


def seed_all(entropy: Sequence[int]) -> None:
    """Seed torch (the CPU and all GPUs), numpy and Python from some integers.

    Randomness is a function of (seed, step, place in the global batch) or (seed, epoch, example), never of what was
    drawn before: so no generator's state has to be saved, and a resumed run draws what the other would have drawn.
    """
    seed = seed_cpu_generators(entropy)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def seed_cpu_generators(entropy: Sequence[int]) -> int:
    """Seed the CPU's generators, in 7 microseconds: for each example, torch.manual_seed's 100 would be too many."""
    seed = derive_seed(*entropy)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
    return seed


def choose_compared_ids(count: int) -> list[int]:
    """Return the indices of the examples whose content is compared: the first, the middle and the last one."""
    return sorted({0, count // 2, count - 1}) if count else []


@dataclass(frozen=True)
class BatchRequest:
    """Examples to be loaded as one batch."""

    ids: Ids  # (B,)
    entropy: tuple[int, ...]  # what, with its id, each one's randomness is drawn from
    now: Now | None = None  # for the recipe of a loader process; None: nobody is training
    first_index: int = 0  # see hvdtrain.recipe.framework.Chunk
    first_place: int | None = None


class BatchDataset(Dataset[Any]):
    """The batches of a split, by request: what loader processes are given.

    Everything that the dataset draws from torch's, numpy's or Python's global generators for an example is a function
    of (entropy, id), and what `collate` draws of (entropy, the batch's ids): never of the rank or the process that
    loads it, or of what was loaded before.
    """

    def __init__(self, recipe: DatasetRecipe, split: Split, dataset: Any) -> None:
        self.recipe, self.split, self.dataset = recipe, split, dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, request: BatchRequest) -> tuple[Ids, Any] | KnownError:
        """Return the ids that were loaded and their batch, or the error that explains why there is none.

        Returned, not raised: a loader process would wrap it into one with another text.
        """
        try:
            return self.load_batch(request)
        except KnownError as error:
            return error

    def load_batch(self, request: BatchRequest) -> tuple[Ids, Any]:
        """Return the ids that were loaded, (B,), and their batch.

        Raises:
            RunError: for an example that is None, and for examples that do not fit into one batch.
            RecipeError: for what the dataset or `collate` raises.
        """
        if request.now is not None and get_worker_info() is not None:
            set_now(self.recipe, request.now)
        ids, examples = request.ids.tolist(), self.load_examples(request)
        seed_cpu_generators([*request.entropy, *ids[:1], len(ids)])
        return request.ids, self._collate_examples(ids, examples)

    def load_examples(self, request: BatchRequest) -> list[Any]:
        """Return the examples of a batch. Raises RunError, RecipeError: see `load_batch`."""
        ids, entropy = request.ids.tolist(), request.entropy
        if request.first_place is None:
            return [self.load_example(i, entropy) for i in ids]
        # An id that comes again draws other numbers.
        return [self.load_example(i, (*entropy, place)) for place, i in enumerate(ids, request.first_place)]

    def load_example(self, i: int, entropy: Sequence[int]) -> Any:
        """Return one example. Raises RunError if it is None, RecipeError for what the dataset raises."""
        seed_cpu_generators([*entropy, i])
        try:
            example = self.dataset[i]
        except (Exception, SystemExit):  # entered only now: there are many examples
            with in_recipe(self.recipe, self._format_call(i)):
                raise
        if example is None:
            raise RunError(f"{self._name_example(i)} is None; expected an example")
        return example

    def _collate_examples(self, ids: Sequence[int], examples: list[Any]) -> Any:
        recipe = self.recipe
        if not is_overridden(recipe, "collate"):
            try:
                return recipe.collate(examples)
            except Exception as error:
                raise explain_full_shared_memory(error) or RunError(
                    self._explain_collate_error(ids, examples, error)
                ) from error
        more = f" and {len(ids) - MAX_IDS_SHOWN} more" if len(ids) > MAX_IDS_SHOWN else ""
        of = f"of dataset({self.split!r})[{', '.join(map(str, ids[:MAX_IDS_SHOWN]))}]{more}"
        with in_recipe(recipe, f"collate() {of}"):
            batch = recipe.collate(examples)
        if batch is None:
            raise RunError(f"{name_call(recipe, 'collate()')} returned None; expected a batch")
        return batch

    def _explain_collate_error(self, ids: Sequence[int], examples: list[Any], error: Exception) -> str:
        """Return why the default collation refuses a batch: which example, or which two."""
        name = type(self.recipe).__name__
        own = getattr(self.dataset, "collate_fn", None)
        how = f"write {name}.collate(self, examples)"
        how += f", which may call the dataset's collate_fn: {type(self.dataset).__name__}.collate_fn" if own else ""
        for i, example in zip(ids, examples, strict=True):
            try:
                self.recipe.collate([example])
            except Exception as alone:
                what = f"is {_with_article(type(example).__name__)}, which the default collation cannot batch"
                text = f"{self._name_example(i)} {what} ({describe_error(alone)})"
                return f"{text}; return arrays, tensors, numbers, tuples or dicts, or {how}"
        for i, example in zip(ids[1:], examples[1:], strict=True):
            try:
                self.recipe.collate([examples[0], example])
            except Exception as pair:
                return (
                    f"{self._name_example(ids[0])} and [{i}] do not fit into one batch ({describe_error(pair)}); {how}"
                )
        return f"{self._name_example(ids[0])} to [{ids[-1]}] do not fit into one batch ({describe_error(error)}); {how}"

    def _check_picklable(self, batch: Any) -> None:
        try:
            pickle.dumps(batch)
        except Exception as error:
            call = name_call(self.recipe, "collate()")
            raise RunError(
                f"{call} returned a batch that a loader process cannot pass on ({describe_error(error)}); return what "
                "can be pickled, or load without such processes (--workers 0)"
            ) from error

    def _format_call(self, i: int) -> str:
        return f"dataset({self.split!r})[{i}]"

    def _name_call(self) -> str:
        return name_call(self.recipe, f"dataset({self.split!r})")

    def _name_example(self, i: int) -> str:
        return name_call(self.recipe, self._format_call(i))

    def list_compared_ids(self) -> list[int]:
        """Return the ids of the examples whose content is compared over ranks."""
        return choose_compared_ids(len(self))

    def check_examples(self, entropy: Sequence[int], most: int, *, passed_on: bool) -> None:
        """Load the first few examples, the middle and the last one, and, if batches hold several, join them.

        most: examples per batch. passed_on: whether loader processes send examples, in which nobody would see an error.
        Raises UserError for what is wrong with them, RecipeError for what the recipe raises.
        """
        count = len(self)
        ids = sorted({*range(min(NUM_CHECKED_EXAMPLES, count)), count // 2, count - 1})
        try:
            examples = [self.load_example(i, entropy) for i in ids]
            size = len(ids) if most > 1 else 1
            for first in range(0, len(ids), size):
                seed_cpu_generators([*entropy, ids[first], size])
                batch = self._collate_examples(ids[first : first + size], examples[first : first + size])
                if passed_on:
                    self._check_picklable(batch)
        except RunError as error:
            raise UserError(str(error)) from error


def check_dataset(recipe: DatasetRecipe, split: Split, dataset: Any) -> None:
    """Raise UserError unless a recipe's dataset is a map-style one that is not empty, or None for no evaluation."""
    call, kind = name_call(recipe, f"dataset({split!r})"), type(dataset).__name__
    expected = "expected a map-style dataset, with len() and [i]"
    if dataset is None and split != "train":
        return
    if dataset is None:
        raise UserError(f"{call} returned None; {expected}: does it lack a return?")
    if isinstance(dataset, DataLoader):
        raise UserError(
            f"{call} returned a {kind}; return its dataset: hvdtrain makes the batches (--batch-size), also of "
            f"{OTHER_DATA}"
        )
    if isinstance(dataset, (IterableDataset, Iterator)):
        what = ", an IterableDataset" if isinstance(dataset, IterableDataset) else ""
        raise UserError(f"{call} returned {kind}{what}; {expected}, or {OTHER_DATA}")
    if isinstance(dataset, Stream):
        if split == "train":
            return
        raise UserError(f"{call} returned a Stream; {expected}: an evaluation scores each example once")
    if isinstance(dataset, Rollouts):
        return
    if isinstance(dataset, (dict, str, bytes)) or not all(
        hasattr(dataset, name) for name in ("__len__", "__getitem__")
    ):
        raise UserError(f"{call} returned {kind}; {expected}")
    with in_recipe(recipe, f"dataset({split!r}).__len__()"):
        count = len(dataset)
    if count == 0:
        hint = "; for no evaluation, return None" if split != "train" else "; expected one example at least"
        raise UserError(f"{call} is empty{hint}")


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def to_device(batch: Any, device: torch.device, memory_format: torch.memory_format) -> Any:
    """Move every tensor of a nested batch to the device; 4-D floating ones (images) into the memory format too.

    A batch may consist of tensors, dicts, lists, tuples, dataclasses and objects with a method `to(device)`.
    """
    if isinstance(batch, torch.Tensor):
        batch = batch.to(device, non_blocking=True)
        if batch.dim() == 4 and batch.is_floating_point():
            batch = batch.contiguous(memory_format=memory_format)
        return batch
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):  # a packed sequence, a graph, an encoding
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device, memory_format) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [to_device(value, device, memory_format) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **to_device(values, device, memory_format))
    return batch
