"""Run on ranks by tests.gpu: collectives, channels and steps on a device. Rank 0 prints RESULT and JSON.

python -m tests.gpu.rank sums cuda            collectives against sums that are known
python -m tests.gpu.rank channels cuda        every codec's step: the same bits on all ranks, nothing goes by the CPU
python -m tests.gpu.rank step cuda MODEL WAY  seconds of each step; WAY: alone, ddp, horovod, bucketed[:SPEC]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.gpu.codecs import SPECS
from tests.gpu.models import TASKS

VALUES = 1 << 20
WARM_UP = 10  # steps that are not measured
SCALARS = 64  # bytes of a copy to the CPU that only tells a number


def summed(x: Tensor, name: str) -> Tensor:
    """The sum over ranks, in place."""
    from hvdtrain.comm import collectives

    return collectives.wait(collectives.all_reduce_async_(x, name))


def sums(device: torch.device, rank: int, size: int) -> dict[str, Any]:
    """An all-reduce, an all-gather and an all-to-all whose results are known."""
    import horovod.torch as hvd

    from hvdtrain.comm import collectives

    for dtype in (torch.float32, torch.float16, torch.float64):
        total = summed(torch.full((VALUES,), rank + 1.0, dtype=dtype, device=device), f"gpu.sum.{dtype}")
        assert total.device == device
        assert (total == size * (size + 1) / 2).all(), dtype
    mine = torch.full((VALUES,), rank, dtype=torch.uint8, device=device)
    gathered = collectives.wait(collectives.all_gather_async(mine, "gpu.gather"))
    expected = torch.arange(size, dtype=torch.uint8, device=device).repeat_interleave(VALUES)
    assert gathered.device == device
    assert torch.equal(gathered, expected)
    parts = torch.arange(size, dtype=torch.uint8, device=device).repeat_interleave(1000) + 10 * rank
    exchanged = collectives.wait(collectives.all_to_all_async(parts, "gpu.exchange"))
    assert torch.equal(exchanged.view(size, 1000)[:, 0].cpu(), 10 * torch.arange(size, dtype=torch.uint8) + rank)
    buffer = torch.ones(25_000_000, device=device)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        summed(buffer, "gpu.large")
        settle(device)
        seconds.append(time.perf_counter() - begin)
    return {"nccl": bool(hvd.nccl_built()), "ms_of_100_MB": 1e3 * min(seconds)}


def channels(device: torch.device, rank: int, size: int) -> dict[str, Any]:
    """{spec: [copies to the CPU of more than a number, their bytes]} of a step of each codec."""
    from hvdtrain.comm import collectives
    from hvdtrain.compression.codec import RandomKey
    from hvdtrain.compression.reducer import CompressedReducer, ReducerOptions
    from hvdtrain.compression.spec import make_codec, parse_compression

    found: dict[str, Any] = {}
    for number, text in enumerate(SPECS):
        spec, key = parse_compression(text), RandomKey(0, 0, number, rank)
        codec = make_codec(spec, spec.argument, [(1024, 1000), (24, 1024)], key, device)
        channel = CompressedReducer(
            f"gpu.{number}", torch.zeros(VALUES, device=device), codec, key, ReducerOptions(feedback=spec.feedback)
        )

        def step(i: int, channel: CompressedReducer = channel) -> None:
            channel.flat.normal_(generator=torch.Generator(device).manual_seed(1000 * rank + i))
            channel.start_reduction(i)
            channel.start_second_round()
            channel.finish_reduction()
            assert channel.sum_is_finite()
            channel.commit_step()

        seen = hashlib.sha256()
        for i in range(3):
            step(i)
            seen.update(channel.flat.cpu().numpy().tobytes())
        everyone = collectives.gather_json(seen.hexdigest(), "gpu.same")
        assert len(set(everyone)) == 1, f"{text}: other bits on other ranks"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            step(3)
            settle(device)
        copies = [copied for copied in copied_to_cpu(profile) if copied > SCALARS]
        found[text] = [len(copies), sum(copies)]
    return found


def copied_to_cpu(profile: torch.profiler.profile) -> list[int]:
    """Bytes of each copy from the device to the CPU's memory, whoever made it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return [int(event["args"]["bytes"]) for event in events if "Memcpy DtoH" in str(event.get("name"))]


def step_seconds(device: torch.device, rank: int, size: int, model: str, way: str, steps: int, tiny: bool) -> Any:
    """Seconds of each step, device and all."""
    torch.manual_seed(0)
    # Horovod itself takes no gradients in channels-last order.
    task = TASKS[model](device, tiny, channels_last=way != "horovod")
    parallel: nn.Module = task.model
    optimizer: Any = task.optimizer
    if way == "ddp":
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://127.0.0.1:{os.environ['GPU_TEST_PORT']}",
            rank=rank,
            world_size=size,
        )
        ids = [device.index] if device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel(task.model, device_ids=ids, gradient_as_bucket_view=True)
    elif way != "alone":
        from hvdtrain.torch import DistributedOptimizer

        exchange: Any
        exchange, _, spec = way.partition(":")
        optimizer = DistributedOptimizer(
            optimizer,
            task.model.named_parameters(),
            compression=f"{spec},warmup=0" if spec else "none",
            exchange=exchange,
        )
    task.model = parallel
    seconds = []
    for _ in range(WARM_UP + steps):
        settle(device)
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        optimizer.step()
        settle(device)
        seconds.append(time.perf_counter() - begin)
    assert loss.isfinite(), loss
    return {"seconds": seconds[WARM_UP:], "parameters": sum(p.numel() for p in task.model.parameters())}


def settle(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sums", "channels", "step"])
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("model", nargs="?", choices=list(TASKS))
    parser.add_argument("way", nargs="?")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank, size = int(os.environ["HOROVOD_RANK"]), int(os.environ["HOROVOD_SIZE"])
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["HOROVOD_LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if options.way not in ("ddp", "alone"):
        import hvdtrain

        hvdtrain.init()
    if options.what == "step":
        result = step_seconds(device, rank, size, options.model, options.way, options.steps, options.tiny)
    else:
        result = (sums if options.what == "sums" else channels)(device, rank, size)
    if rank == 0:
        print("RESULT", json.dumps(result), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
