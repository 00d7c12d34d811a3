"""What recipes of all frameworks have in common: a dataset, its order and its batches, and outputs by example."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hvdtrain.recipe import base


@dataclass(kw_only=True)
class DatasetRecipe(base.Recipe):
    """A recipe that gives its data as a map-style dataset: what a framework's Recipe derives from.

    Attributes:
        stack_examples: what makes a batch of a list of examples, unless the recipe has a method `collate`: the
            framework's default.
    """

    # How buffers that training changes are combined over ranks after each step, by name or pattern ("*.queue"):
    # "mean" (by the ranks' shares of the batch), "sum" (of the ranks' changes: counters), "rank0" or "local". What
    # batch norm keeps needs no entry.
    buffers: ClassVar[dict[str, str]] = {}
    stack_examples: ClassVar[Callable[[list[Any]], Any]]

    @abstractmethod
    def dataset(self, split: str) -> Any:
        """Return the examples of a split: an object with len() and [i]; None for one that is not to be evaluated.

        It is called for "train", then for each name in `evals`, by default "eval", each time with torch's, numpy's and
        Python's global generators newly seeded from --seed: a random split (`random_split`, `train_test_split`) is the
        same each time.
        """
        raise NotImplementedError

    def sampler(self, split: str, epoch: int) -> Any:
        """Return the order of an epoch (from 0) of training; None, the default, for a shuffled one.

        A float tensor or array of len(dataset): weights, by which len(dataset) examples are drawn, with replacement.
        Integers, as a tensor, a list, or a torch Sampler: the ids of the epoch's examples in their order, as many as
        they are; an id may come several times, or not at all. All epochs of a run must have equally many.

        It is called with the split "train" only, on rank 0, whose order all ranks take, at the beginning of each epoch
        and where a run resumes, with torch's, numpy's and Python's global generators seeded by (seed, epoch). Before a
        run's first step `now.steps` and `now.epochs` are not known. An evaluation scores each of its examples once: let
        `dataset` return the examples to evaluate.
        """
        return None

    def collate(self, examples: list[Any]) -> Any:
        """Return the batch of some examples, for `score`; by default their arrays, tensors and numbers are stacked.

        Override it to pad examples of different sizes, or to join objects of your own. It runs wherever examples are
        loaded, with --workers in other processes. Arrays and tensors of the batch are moved to the device, in dicts,
        lists, tuples and dataclasses; in torch also by the batch's own method `to(device)`.
        """
        return type(self).stack_examples(examples)

    def outputs(self, model: Any, batch: Any) -> Mapping[str, Any]:
        """Return outputs of a batch of B examples, tensors or arrays (B, ...) whose other sizes never change.

        With a method `summarise`, it is called in evaluations, without gradients, unless `score` has returned outputs;
        and by `hvdtrain predict`.
        """
        raise NotImplementedError
