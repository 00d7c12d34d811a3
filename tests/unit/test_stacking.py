"""The default batches of numpy arrays, and arrays as a dataset."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from hvdtrain.data import Arrays
from hvdtrain.data.stacking import stack_examples
from hvdtrain.recipe.base import is_overridden
from hvdtrain.recipe.dataset_recipe import DatasetRecipe
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.torch.data import BatchDataset, BatchRequest
from tests.unit.test_examples import Mine as TorchRecipe

Pair = namedtuple("Pair", ["x", "y"])


@dataclass(kw_only=True)
class Framework(DatasetRecipe):
    """As the Recipe of a framework that takes numpy arrays."""

    framework: ClassVar[str] = "numpy"
    stack_examples = staticmethod(stack_examples)


class Mine(Framework):
    def dataset(self, split: str) -> Any:
        raise NotImplementedError


class Own(Mine):
    def collate(self, examples: list[Any]) -> Any:
        return super().collate([(example, 1) for example in examples])

    def sampler(self, split: str, epoch: int) -> Any:
        return [0]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 2], np.int64),
        ([True, False], np.bool_),
        ([True, 2], np.int64),
        ([0.5, 1.5], np.float32),
        ([1, 0.5], np.float32),
        ([np.float64(0.5), np.float64(1)], np.float64),
        ([np.uint8(1), np.uint8(2)], np.uint8),
        ([np.float16([1]), np.float16([2])], np.float16),
        ([np.array([True]), np.array([False])], np.bool_),
        ([np.float32(1), np.float64(2)], np.float64),
        ([torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)], np.int32),
    ],
)
def test_numbers_and_arrays_are_stacked_and_keep_their_type(values: list[Any], dtype: type) -> None:
    batch = stack_examples(values)
    assert isinstance(batch, np.ndarray)
    assert batch.dtype == dtype
    assert batch.tolist() == [value if isinstance(value, (int, float)) else value.tolist() for value in values]


def test_bfloat16_is_stacked() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert stack_examples([np.ones(2, ml_dtypes.bfloat16)] * 3).dtype == ml_dtypes.bfloat16


def test_nested_examples_keep_their_structure() -> None:
    batch = stack_examples([OrderedDict(a=(i, [np.ones(3) * i]), b=Pair(f"t{i}", {"c": 0.5})) for i in (1, 2)])
    assert list(batch) == ["a", "b"]
    numbers, (arrays,) = batch["a"]
    assert isinstance(batch["a"], tuple) and isinstance(batch["a"][1], list)
    assert numbers.tolist() == [1, 2] and arrays.tolist() == [[1.0] * 3, [2.0] * 3]
    assert isinstance(batch["b"], Pair)
    assert batch["b"].x == ["t1", "t2"] and batch["b"].y["c"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        ((np.ones(3), np.ones(4)), "the example has different shapes: (3,) and (4,)"),
        (({"x": np.ones(3)}, {"x": np.ones((3, 1))}), "part ['x'] has different shapes: (3,) and (3, 1)"),
        (({"x": 1}, {"y": 1}), "the example has different keys: ['x'] and ['y']"),
        (((1, [1, 2]), (1, [1])), "part [1] has different lengths: 2 and 1"),
        (((1, [1, 2]), (1, (1, 2))), "part [1] is of different types: list and tuple"),
        (("text", 1), "the example is of different types: str and int"),
        ((1, np.ones(2)), "the example has different shapes: () and (2,)"),
    ],
)
def test_examples_that_differ_are_refused_by_the_part(pair: tuple[Any, Any], text: str) -> None:
    with pytest.raises(ValueError) as refused:
        stack_examples(pair)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (object(), "the example is of type object; expected an array or a number"),
        ({"x": (1, None)}, "part ['x'][1] is of type NoneType; expected an array or a number"),
        (np.array(["a"]), "the example is of type ndarray of <U1; expected an array or a number"),
        (np.array([None]), "the example is of type ndarray of object; expected an array or a number"),
        (np.zeros(1, [("a", "f4")]), "the example is of type ndarray of [('a', '<f4')]; expected an array or a number"),
    ],
)
def test_what_is_no_array_is_refused_by_the_part(example: Any, text: str) -> None:
    with pytest.raises(TypeError) as refused:
        stack_examples([example])
    assert str(refused.value) == text


def test_only_methods_of_the_recipes_own_count_as_overridden() -> None:
    names = ("collate", "sampler", "outputs", "metrics")
    assert [is_overridden(Mine(), name) for name in names] == [False] * 4
    assert [is_overridden(Own(), name) for name in names] == [True, True, False, False]
    assert [is_overridden(TorchRecipe(), name) for name in names] == [False] * 4


def test_an_unrelated_base_does_not_make_a_default_an_own_method() -> None:
    class Unrelated:
        def sampler(self, split: str, epoch: int) -> Any:
            return [0]

    class Last(TorchRecipe, Unrelated):
        pass

    class First(Unrelated, TorchRecipe):
        pass

    assert not is_overridden(Last(), "sampler")
    assert is_overridden(First(), "sampler")


def load(recipe: DatasetRecipe, dataset: Any, *ids: int) -> Any:
    return BatchDataset(recipe, "train", dataset)[BatchRequest(np.array(ids), (0, 0))]


def test_batches_of_a_frameworks_default_are_loaded_and_refused_by_the_examples_that_do_not_fit() -> None:
    images, labels = np.arange(12.0, dtype=np.float32).reshape(6, 2), np.arange(6)
    _, (x, y) = load(Mine(), Arrays(images, labels), 5, 0)
    assert type(x) is np.ndarray and x.dtype == np.float32 and x.tolist() == [[10, 11], [0, 1]] and y.tolist() == [5, 0]
    ragged = [np.ones(2), np.ones(2), np.ones(3)]
    error = load(Mine(), ragged, 0, 1, 2)
    assert isinstance(error, RunError)
    assert str(error) == (
        "Mine.dataset('train')[0] and [2] do not fit into one batch (ValueError: the example has different shapes: "
        "(2,) and (3,)); write Mine.collate(self, examples)"
    )
    assert str(load(Mine(), [1, {2}], 0, 1)) == (
        "Mine.dataset('train')[1] is a set, which the default collation cannot batch (TypeError: the example is of "
        "type set; expected an array or a number); return arrays, tensors, numbers, tuples or dicts, or write "
        "Mine.collate(self, examples)"
    )


def test_arrays_are_examples_in_order_or_by_name() -> None:
    x, y = np.arange(6).reshape(3, 2), np.array([0.5, 1.5, 2.5])
    assert len(Arrays(x, y)) == 3
    example = Arrays(x, y)[1]
    assert example[0].tolist() == [2, 3] and example[1] == 1.5 and isinstance(example, tuple)
    assert Arrays(x)[2].tolist() == [4, 5]
    named = Arrays(image=x, label=y)[0]
    assert list(named) == ["image", "label"] and named["label"] == 0.5
    assert Arrays([1, 2], torch.ones(2))[0] == (1, 1.0)
    with pytest.raises(IndexError):
        Arrays(x, y)[3]


def test_arrays_serve_torch_recipes() -> None:
    _, (x, y) = load(TorchRecipe(), Arrays(np.ones((3, 2), np.float32), np.arange(3)), 2, 1)
    assert x.shape == (2, 2) and x.dtype == torch.float32
    assert torch.equal(y, torch.tensor([2, 1]))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Arrays(np.ones(3), [1, 2]), "Arrays: array 1 has 2 examples, array 0 3; expected equally many"),
        (lambda: Arrays(x=np.ones(3), y=[]), "Arrays: y has 0 examples, x 3; expected equally many"),
        (lambda: Arrays(np.ones(3), 1), "Arrays: array 1 is a single value; expected an array (N, ...)"),
        (lambda: Arrays(), "expected arrays either in order or by name: Arrays(x, y), or Arrays(image=x, label=y)"),
        (
            lambda: Arrays(np.ones(3), y=[1]),
            "expected arrays either in order or by name: Arrays(x, y), or Arrays(image=x, label=y)",
        ),
    ],
)
def test_arrays_that_are_no_dataset_are_refused(make: Any, text: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == text
