"""One rank of `hvdtrain horovod check`: an all-reduce whose sum is known."""

from __future__ import annotations

import json
import statistics
import sys
import time

from hvdtrain.native.check import PROBE_MARK

NUMBERS = 1 << 20  # 4 MiB
TIMES = 5


def main() -> None:
    """Sum a tensor over all ranks; rank 0 prints how long it took, and every rank fails if the sum is wrong."""
    import torch

    torch.set_num_threads(1)
    import horovod.torch as hvd

    hvd.init()
    mine = torch.full((NUMBERS,), float(hvd.rank() + 1))
    expected = hvd.size() * (hvd.size() + 1) / 2
    seconds = []
    for _ in range(TIMES):
        start = time.perf_counter()
        total = hvd.allreduce(mine, op=hvd.Sum, name="check")
        seconds.append(time.perf_counter() - start)
        if not bool((total == expected).all()):
            sys.exit(f"rank {hvd.rank()}: the sum is {total[0].item()}, expected {expected}")
    if hvd.rank() == 0:
        print(PROBE_MARK + json.dumps({"ranks": hvd.size(), "ms": 1000 * statistics.median(seconds)}), flush=True)
    hvd.shutdown()


if __name__ == "__main__":
    main()
