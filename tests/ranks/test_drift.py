"""`--diagnose` names the rank and the tensor of which one bit was changed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.diagnosis.diagnosis import Diagnosis
from hvdtrain.exchange.checksums import CHECKSUM_BLOCK_VALUES, INTEGER_DTYPES
from hvdtrain.system.errors import RunError
from hvdtrain.system.gpu import GpuMonitor
from hvdtrain.torch.tensors import checksum_model
from tests.support.worlds import on_ranks


class Odd(nn.Module):
    """Tensors of many types and shapes, and one that is not in the state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64):
            self.register_parameter(f"p_{str(dtype)[6:]}", nn.Parameter(torch.randn(5, 7, dtype=dtype)))
        self.images = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(6)
        self.long = nn.Linear(1000, 2 * CHECKSUM_BLOCK_VALUES // 1000)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("scratch", torch.full((3,), float(collectives.rank())), persistent=False)


class OnlyChecksums:
    """As much of a step as is compared."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def checksum_state(self) -> dict[str, int]:
        return checksum_model(self.model)


def flip(tensor: torch.Tensor, place: int, bit: int) -> None:
    """Change one bit of one value, by hand."""
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    values = flat.contiguous().reshape(-1)
    bits = values.view(INTEGER_DTYPES[values.element_size()])
    bits[place % len(bits)] ^= 1 << bit
    flat.copy_(values.view(flat.shape))


@on_ranks(3)
@pytest.mark.parametrize("seed", [random.randrange(10**6)], ids=["seed"])
def test_one_bit_is_named_20_times_of_20(seed: int, tmp_path: Path) -> None:
    """One bit of one value of a random tensor of a random rank."""
    print(f"drawn from {seed}")
    world = hvdtrain.init()
    draw = random.Random(seed)
    model = Odd()
    step: Any = OnlyChecksums(model)
    diagnosis = Diagnosis(world, tmp_path, 10, GpuMonitor(None), 0, [])
    tensors = {name: value for name, value in model.state_dict().items() if value.numel()}
    for trial in range(20):
        diagnosis.record_exchange(0.0, 0.0)
        assert diagnosis.compare_ranks(step, 2 * trial + 1, ends=False) is not None  # all is the same
        rank, name, place, bit = draw.randrange(world.size), draw.choice(list(tensors)), draw.randrange(10**6), 0
        if rank == world.rank:
            flip(tensors[name], place, bit)
        diagnosis.record_exchange(0.0, 0.0)
        with pytest.raises(RunError) as found:
            diagnosis.compare_ranks(step, 2 * trial + 2, ends=False)
        said = f"differ after step {2 * trial + 2}, and were the same after step {2 * trial + 1}: on rank {rank} on "
        assert said in str(found.value) and f", {name} is not what it is on" in str(found.value), str(found.value)
        assert "more tensor" not in str(found.value)
        if rank == world.rank:
            flip(tensors[name], place, bit)  # as it was


@on_ranks(3)
def test_drift_names_the_first_tensor_and_no_rank_without_a_majority(tmp_path: Path) -> None:
    """The order of values counts, the second of two tensors is not named, and nobody is if no two ranks agree."""
    world, model = hvdtrain.init(), Odd()
    step: Any = OnlyChecksums(model)
    diagnosis = Diagnosis(world, tmp_path, 10, GpuMonitor(None), 0, [])
    if world.rank == 1:
        with torch.no_grad():
            model.long.bias.copy_(model.long.bias.flip(0))
            model.images.bias.add_(1)
    diagnosis.record_exchange(0.0, 0.0)
    with pytest.raises(RunError, match=r"on rank 1 on \S+, images.bias is not .*; 1 more tensor differs"):
        diagnosis.compare_ranks(step, 50, ends=False)
    if world.rank:
        with torch.no_grad():
            model.images.bias.fill_(world.rank)
    with pytest.raises(RunError, match="no value has a majority"):
        diagnosis.compare_ranks(step, 51, ends=False)
    if world.rank == 0:
        drift = json.loads((tmp_path / "diagnose.json").read_text())["drift"]
        assert (drift["step"], drift["tensor"], drift["majority"], drift["tensors"]) == (51, "images.bias", False, 2)
        assert [row["rank"] for row in drift["ranks"]] == [0, 1, 2]
