"""Hashes of examples: the same in every process for the same content, another for any other content."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hvdtrain.comm.agreement import ConsistentPart, check_against_record, make_agreement_record, parse_agreement_record
from hvdtrain.comm.world import World
from hvdtrain.system.errors import RunError, UserError
from hvdtrain.system.records import encode_record
from hvdtrain.torch.consistency import examples_part, find_changed_hash
from hvdtrain.torch.data import choose_compared_ids
from hvdtrain.torch.example_digest import digest_example


class Colour(Enum):
    RED = 1
    BLUE = 2


Pair = namedtuple("Pair", "a b")


@dataclass
class Example:
    image: Any
    label: int


def image(value: int) -> Image.Image:
    return Image.fromarray(np.full((2, 3), value, np.uint8))


DIFFERENT = [
    None, True, False, 0, 1, -1, 2**70, 0.0, -0.0, 1.0, float("nan"), 1j, "", "a", "b", b"", b"a",
    [], [1], [1, 2], [2, 1], [[1], 2], (1,), {1}, {1, 2}, frozenset({1}), {}, {"a": 1}, {"a": 2}, {"b": 1},
    Pair(1, 2), Pair(2, 1), Example(1, 2), Example(2, 1), Colour.RED, Colour.BLUE, range(2), range(3),
    datetime.date(2026, 1, 1), datetime.date(2026, 1, 2), Path("a"), Path("b"), image(1), image(2),
    np.zeros(2), np.zeros(3), np.zeros((1, 2)), np.zeros(2, np.float32), np.ones(2), np.float32(1), np.int64(1),
    np.array(["a"], object), np.array(["b"], object),
    torch.zeros(2), torch.zeros(3), torch.zeros(1, 2), torch.zeros(2).double(), torch.zeros(2).bfloat16(),
    torch.zeros(2, dtype=torch.bool), torch.tensor([0.0, 1.0]), torch.tensor(1.0), torch.zeros(0),
    torch.zeros(2, dtype=torch.cfloat), torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse(),
]  # fmt: skip


def test_other_content_has_another_hash() -> None:
    digests = [digest_example(value) for value in DIFFERENT]
    twice = [(DIFFERENT[i], DIFFERENT[j]) for j in range(len(digests)) for i in range(j) if digests[i] == digests[j]]
    assert not twice


def test_the_same_content_has_the_same_hash() -> None:
    assert digest_example({"a": 1, "b": torch.ones(2)}) == digest_example({"b": torch.ones(2), "a": 1})
    turned = torch.arange(6).reshape(2, 3).T
    assert digest_example(turned) == digest_example(turned.contiguous())
    assert digest_example(np.arange(6)[::2]) == digest_example(np.array([0, 2, 4]))
    conjugated = torch.ones(2, dtype=torch.cfloat).conj()
    assert digest_example(conjugated) == digest_example(conjugated.resolve_conj())


def test_what_cannot_be_hashed_counts_by_its_type() -> None:
    assert digest_example((object(), 1)) == digest_example((object(), 1)) != digest_example((object(), 2))
    itself: list[Any] = [1]
    itself.append(itself)
    assert digest_example(itself) == digest_example(itself)
    assert digest_example({object(): 1}) == digest_example({object(): 1})


def test_sets_and_texts_have_the_same_hash_in_every_process() -> None:
    program = (
        "from hvdtrain.torch.example_digest import digest_example as d\n"
        "print(d([{'age', 'height', 'weight'}, {'b': 1, 'a': {'x', 'y'}}]))"
    )
    digests = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        digests.add(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True).stdout)
    assert len(digests) == 1


def test_three_examples_are_compared() -> None:
    assert [choose_compared_ids(count) for count in (0, 1, 2, 3, 40, 41)] == [
        [],
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 20, 39],
        [0, 20, 40],
    ]


def test_examples_that_are_never_the_same_are_not_compared() -> None:
    from hvdtrain.torch.consistency import SeededExamples

    calls = iter(range(100))
    part = examples_part({"train": SeededExamples([0, 2, 3], lambda i: i if i else next(calls))})
    assert list(part.values) == ["dataset('train')[0]", "dataset('train')[2]", "dataset('train')[3]"]
    assert list(part.find_stable_values()) == ["dataset('train')[2]", "dataset('train')[3]"]
    earlier = {**part.values, "dataset('train')[0]": "other"}
    assert find_changed_hash(part, earlier) is None
    assert find_changed_hash(part, {**earlier, "dataset('train')[3]": "other"}) == "dataset('train')[3]"
    assert find_changed_hash(part, {"dataset('train')[9]": "of a longer dataset"}) is None


HERE = World(0, 1, 0, 1, "b")


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"x": "1", "y": "2"}, None),
        ({"x": "1", "y": "3"}, "this worker on b: y is 3, the run has 2"),
        ({"x": "1"}, "this worker on b: y is none, the run has 2"),
        ({"x": "1", "y": "2", "z": "3"}, "this worker on b: z is 3, the run has none"),
        ({"y": "2", "x": "1"}, None),
    ],
)
def test_a_newcomer_is_compared_with_the_run_s_record(here: dict[str, str], message: str | None) -> None:
    text = "{who}: {key} is {here}, {base} has {there}"
    first = [ConsistentPart("a", {}, text), ConsistentPart("settings", {"x": "1", "y": "2"}, text)]
    recorded = parse_agreement_record(json.loads(json.dumps(encode_record(make_agreement_record(first)))))
    parts = [ConsistentPart("a", {}, text), ConsistentPart("settings", here, text)]
    if message is None:
        check_against_record(parts, recorded, HERE)
        return
    with pytest.raises(UserError) as refused:
        check_against_record(parts, recorded, HERE)
    assert str(refused.value) == message


def test_of_a_long_part_the_record_holds_the_hash_only() -> None:
    long = ConsistentPart("parameters", {str(i): "x" * 100 for i in range(1000)}, "{who}: {key}")
    recorded = make_agreement_record([long])
    assert recorded["parameters"].values is None
    check_against_record([long], recorded, HERE)
    with pytest.raises(UserError, match=r"^this worker on b: its parameters differ from those of the run$"):
        check_against_record([ConsistentPart("parameters", {}, "")], recorded, HERE)


@pytest.mark.parametrize("value", [None, [], {"a": 1}, {"a": {"digest": "0", "values": [["x"]]}}])
def test_a_record_that_is_not_one_is_refused(value: object) -> None:
    with pytest.raises(RunError, match="record of what all its workers must have the same is invalid"):
        parse_agreement_record(value)
