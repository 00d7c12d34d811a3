"""All-reduces between two ranks at a time, by Horovod, of all pairs in turn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from hvdtrain.comm import collectives, network_model
from hvdtrain.comm.horovod import init_process_sets

NUM_VALUES = 1 << 14  # of four bytes: also a slow link carries it in no time
REPEATS_PER_PAIR = 5


def benchmark_pairs(pairs: Sequence[tuple[int, int]]) -> dict[str, tuple[float, bool]]:
    """Start Horovod and reduce over each pair that this rank is in, all ranks in the same order.

    Returns for each such pair, as "0-2": the median seconds, and whether the sum was right. Raises what Horovod raises.
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
        results[f"{pair[0]}-{pair[1]}"] = (statistics.median(seconds), right)
    return results
