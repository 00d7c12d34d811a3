"""All-reduces over two ranks at a time, through Horovod, one pair after the other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from hvdtrain.comm import collectives, network_model
from hvdtrain.comm.horovod import init_process_sets

NUM_VALUES = 1 << 14  # of 4 bytes: little, also for a slow link
REPEATS_PER_PAIR = 5


def benchmark_pairs(pairs: Sequence[tuple[int, int]]) -> dict[tuple[int, int], tuple[float, bool]]:
    """Start Horovod and all-reduce over each pair that this rank is in.

    Args:
        pairs: of ranks; the same on all ranks, in the same order.

    Returns:
        the median seconds and whether the sum was right, for each such pair.

    Raises:
        Exception: what Horovod raises.
    """
    torch.set_num_threads(1)
    world, groups = init_process_sets(pairs)
    rank = world.rank
    results = {}
    for pair, group in zip(pairs, groups, strict=True):
        if rank not in pair:
            continue
        name = f"pair.{pair[0]}-{pair[1]}"
        tensor = torch.full((NUM_VALUES,), float(rank + 1))
        reduced = collectives.wait(collectives.all_reduce_async_(tensor, f"{name}.sum", group=group))
        right = bool((reduced == sum(pair) + 2).all())
        seconds = network_model.time_all_reduces(torch.zeros(NUM_VALUES), name, REPEATS_PER_PAIR, group)
        results[pair] = (statistics.median(seconds), right)
    return results
