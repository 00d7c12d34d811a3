"""Which ranks' GPUs are slower than they could be, by what NVML reads of them. No collectives."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from hvdtrain.diagnosis.straggler import GPU, Straggler
from hvdtrain.system.gpu import GpuReading

GPU_TIME_PARTS = ("compute", "between")  # of TIME_PARTS: what a slow GPU takes longer for
LOW_CLOCK_SHARE = 0.9  # of the other GPUs' clocks: one below makes steps longer by a straggler's tenth


def find_slow_gpus(readings: Sequence[GpuReading | None]) -> dict[int, str]:
    """Return what makes GPUs slow, by rank: of those whose clock is lower than the others', each over its highest one.

    What all are throttled by, as by a power cap in a full load, explains no difference. If there is no clock to compare
    with, a GPU counts that is throttled by what most others are not.
    """
    found = {}
    for rank, own in enumerate(readings):
        others = [one for other, one in enumerate(readings) if one is not None and other != rank]
        if own is None:
            continue
        share = own.clock_share()
        shares = [clock for one in others if (clock := one.clock_share()) is not None]
        if share is not None and shares:
            is_slow = share < LOW_CLOCK_SHARE * statistics.median(shares)
        else:
            counts = [sum(reason in (one.throttle or ()) for one in others) for reason in own.throttle or ()]
            is_slow = any(2 * count <= len(others) for count in counts)
        if is_slow:
            found[rank] = own.describe_speed()
    return found


def explain_by_gpu(straggler: Straggler | None, slow_gpus: dict[int, str]) -> Straggler | None:
    """Return a straggler with the cause GPU if it is slow in what its GPU does, and that is one of the slow ones."""
    if straggler is None or straggler.cause not in GPU_TIME_PARTS or straggler.rank not in slow_gpus:
        return straggler
    return replace(straggler, cause=GPU, detail=slow_gpus[straggler.rank])
