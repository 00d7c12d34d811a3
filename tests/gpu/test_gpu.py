"""What of tests.gpu gives right or wrong, on a GPU; on the CPU too where that tells something of the checks.

HVDTRAIN_REQUIRE_GPU=1 in the environment makes a missing GPU a failure.
"""

from __future__ import annotations

import os

import pytest
import torch

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
