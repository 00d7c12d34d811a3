"""What of tests.gpu gives right or wrong, on a GPU; on the CPU too where that tells something of the checks.

HVDTRAIN_REQUIRE_GPU=1 in the environment makes a missing GPU a failure.
"""

from __future__ import annotations

import os

import pytest
import torch

from hvdtrain.system.gpu import GpuMonitor
from hvdtrain.torch.gpu import find_gpu_uuid
from tests.gpu import codecs
from tests.gpu.__main__ import Refused, check_build, check_channels, check_codec, check_sums, check_training


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        need_gpu()
    return str(request.param)


@pytest.fixture
def gpu() -> str:
    need_gpu()
    return "cuda"


def need_gpu() -> None:
    if torch.cuda.is_available():
        return
    if os.environ.get("HVDTRAIN_REQUIRE_GPU") == "1":
        pytest.fail("torch sees no GPU here (and HVDTRAIN_REQUIRE_GPU=1)")
    pytest.skip("torch sees no GPU here")


def test_horovod_is_built_with_nccl(gpu: str) -> None:
    check_build(gpu)


def test_collectives_give_correct_results(device: str) -> None:
    check_sums(device, 1)


@pytest.mark.parametrize("text", codecs.SPECS)
def test_codec_gives_the_same_result_as_on_the_cpu(text: str, device: str) -> None:
    check_codec(device, text)


def test_channels_keep_tensors_on_the_device(device: str) -> None:
    check_channels(device, 1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_gpu(ranks: int, gpu: str) -> None:
    try:
        check_sums(gpu, ranks)
    except Refused as refusal:
        pytest.skip(f"NCCL does not let ranks share a GPU here: {refusal}")
    check_channels(gpu, ranks)
    check_training(gpu, ranks)


def test_the_gpu_of_the_device_is_read(gpu: str) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    monitor = GpuMonitor(find_gpu_uuid(device))
    held = torch.zeros(1 << 28, dtype=torch.uint8, device=device)
    reading = monitor.read()
    assert reading is not None, monitor.take_notes()
    total = torch.cuda.get_device_properties(device).total_memory
    assert reading.memory_total is not None and abs(reading.memory_total - total) < 0.1 * total
    assert reading.memory_used is not None and reading.memory_used >= held.numel()
    for value, most in ((reading.utilization, 100), (reading.temperature, 120), (reading.sm_clock, 5000)):
        assert value is None or 0 <= value <= most, reading
    print(reading, monitor.take_notes())
