"""Naming the replica that is not as the others, and the checksums that tell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from hvdtrain.diagnosis.drift import Drift, find_drift, hash_checksums
from hvdtrain.exchange import checksums
from hvdtrain.exchange.checksums import INTEGER_DTYPES
from hvdtrain.system.errors import RunError
from hvdtrain.torch.buffers import check_tensors_finite
from hvdtrain.torch.tensors import checksum_model

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.complex64]


@settings(deadline=None)
@given(st.data(), st.integers(1, 12), st.integers(2, 9))
def test_those_outside_the_majority_are_named(data: DataObject, tensors: int, ranks: int) -> None:
    same = {f"t{i}": data.draw(st.integers(-(2**63), 2**63 - 1)) for i in range(tensors)}
    replicas = [dict(same) for _ in range(ranks)]
    assert find_drift(replicas) is None and len({hash_checksums(own) for own in replicas}) == 1
    wrong = sorted(data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=max(1, (ranks - 1) // 2))))
    first = data.draw(st.integers(0, tensors - 1))
    for rank in wrong:
        for i in range(first, tensors):
            replicas[rank][f"t{i}"] += 1
    expected = wrong if ranks > 2 else [0, 1]
    assert find_drift(replicas) == Drift(f"t{first}", expected, ranks > 2, tensors - first)
    assert len({hash_checksums(own) for own in replicas}) == 2


def test_without_a_majority_all_are_named() -> None:
    assert find_drift([{"w": 1}, {"w": 1}, {"w": 2}, {"w": 2}]) == Drift("w", [0, 1, 2, 3], False, 1)
    assert find_drift([{"w": 1, "v": 3}, {"w": 1}, {"w": 1, "v": 3}]) == Drift("v", [1], True, 1)
    assert find_drift([{}]) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_checksum_tells_every_bit_and_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "CHECKSUM_BLOCK_VALUES", 64)
    draw = torch.Generator().manual_seed(0)
    tensor = (torch.randn(10, 20, generator=draw) * 50).abs().to(dtype)
    known = int(checksums.checksum_tensor(tensor))
    assert int(checksums.checksum_tensor(tensor.t().contiguous().t())) == known  # however it lies in memory
    found = set()
    real = torch.view_as_real(tensor) if dtype.is_complex else tensor
    bits = real.reshape(-1).view(INTEGER_DTYPES[real.element_size()])
    for place in torch.randint(len(bits), (50,), generator=draw).tolist():
        bits[place] ^= 1
        found.add(int(checksums.checksum_tensor(tensor)))
        bits[place] ^= 1
    assert known not in found and int(checksums.checksum_tensor(tensor)) == known
    assert int(checksums.checksum_tensor(tensor.flip(0))) != known
    assert int(checksums.checksum_tensor(-tensor)) != known


def test_empty_tensors_and_modules_have_checksums() -> None:
    assert int(checksums.checksum_tensor(torch.zeros(0))) == 0
    assert checksum_model(torch.nn.ReLU()) == {}


def test_what_is_not_finite_is_named() -> None:
    """A parameter, and a buffer only where training changes it."""
    model = torch.nn.BatchNorm1d(2)
    mean = model.running_mean
    assert mean is not None
    mean[1] = torch.inf
    check_tensors_finite(list(model.named_parameters()))
    with pytest.raises(RunError, match="running_mean is not finite; no checkpoint was written"):
        check_tensors_finite([*model.named_parameters(), ("running_mean", mean)])
