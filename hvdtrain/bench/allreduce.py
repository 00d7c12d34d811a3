"""All-reduces of many sizes, printed as nccl-tests prints them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from hvdtrain.bench.workload import describe_world, print_on_root
from hvdtrain.comm import collectives, network_model
from hvdtrain.comm.world import World
from hvdtrain.torch.setup import choose_device

MAX_REPEATS = 20
MAX_SECONDS_PER_SIZE = 2.0  # seconds of repeats of one size, if three repeats take no longer


def benchmark_all_reduce(world: World, sizes: Sequence[int], dtype: str, wanted: str | None) -> None:
    """Print a row for each size, and the latency and bandwidth that fit the smallest and the largest.

    Args:
        world: of this rank.
        sizes: in bytes, increasing.
        dtype: of the values, a name in `torch`.
        wanted: "cpu", "cuda", or None for cuda if there is one.
    """
    device = choose_device(wanted, world.local_rank)
    width = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    print_on_root(world, f"# all-reduce in place, {describe_world(world, device)}")
    print_on_root(world, "#     size        count     type    time us  algbw GB/s  busbw GB/s    #wrong")
    sent, seconds = [], []
    for size in sizes:
        count = size // width
        tensor = torch.zeros(count, dtype=getattr(torch, dtype), device=device)
        name = f"bench.{size}.{dtype}"
        once = network_model.time_all_reduces(tensor, name, 1)[0]
        repeats = max(3, min(MAX_REPEATS, int(MAX_SECONDS_PER_SIZE / once)))
        sent.append(collectives.ring_all_reduce_bytes(count * width, world.size))
        seconds.append(statistics.median(network_model.time_all_reduces(tensor, name, repeats)))
        algorithm = count * width / seconds[-1] / 1e9
        bus = algorithm * 2 * (world.size - 1) / world.size
        wrong = count_wrong_values(tensor, name, world)
        print_on_root(
            world,
            f"{count * width:10}   {count:10}  {dtype:>7}  {seconds[-1] * 1e6:9.1f}  {algorithm:10.3f}  {bus:10.3f}"
            f"  {wrong:8}",
        )
    if len(sizes) > 1:
        latency, bandwidth = network_model.fit_line(sent, seconds)
        print_on_root(
            world, f"# fitted: {latency * 1e3:.3g} ms a collective, {format_bandwidth(bandwidth)} sent by each rank"
        )


def count_wrong_values(tensor: torch.Tensor, name: str, world: World) -> int:
    """All-reduce small integers and return how many values are wrong, on all ranks together."""
    numbers = torch.arange(len(tensor), device=tensor.device).remainder_(7)
    tensor.copy_(numbers + world.rank % 2)
    reduced = collectives.wait(collectives.all_reduce_async_(tensor, name))
    right = numbers * world.size + world.size // 2
    wrong = int((reduced != right.to(tensor.dtype)).sum())
    return sum(collectives.gather_json(wrong, f"{name}.wrong"))


def format_bandwidth(bandwidth: float) -> str:
    """Return bytes per second in readable units."""
    return f"{bandwidth / 1e9:.3g} GB/s = {bandwidth * 8 / 1e9:.3g} Gbit/s"
