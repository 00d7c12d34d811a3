"""Model the network as a line: a latency for each collective, and a time for each byte."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm import collectives

PROBE_SIZES = tuple(1 << power for power in (12, 16, 18, 20, 22))  # 4 KiB to 4 MiB
MAX_PROBE_SECONDS = 0.15  # the first size that takes this long is the last one


@dataclass(frozen=True)
class NetworkModel:
    """The network between ranks, on which a collective takes latency + sent / bandwidth seconds.

    Attributes:
        ranks: how many they are.
        latency: seconds.
        bandwidth: bytes per second that one rank sends.
    """

    ranks: int
    latency: float
    bandwidth: float

    def predict_seconds(self, sent: float) -> float:
        """Return how long a collective takes in which each rank sends this many bytes."""
        return self.latency + sent / self.bandwidth


def measure_network(name: str, group: collectives.Group = None, device: torch.device | str = "cpu") -> NetworkModel:
    """Measure the network between the ranks of a group by a few all-reduces; all return the same model.

    All ranks of the group call it. It takes two seconds at 100 Mbit/s.

    Args:
        name: of the collectives.
        group: the ranks that take part; None: all.
        device: of the tensors, which decides whether MPI, Gloo or NCCL carries them.
    """
    ranks = collectives.size(group)
    if ranks == 1:
        return NetworkModel(1, 0.0, math.inf)
    sent: list[int] = []
    seconds: list[float] = []
    for size in PROBE_SIZES:
        sent.append(collectives.ring_all_reduce_bytes(size, ranks))
        repeats = 3 if seconds and seconds[-1] > MAX_PROBE_SECONDS / 10 else 9
        taken = time_all_reduces(torch.zeros(size // 4, device=device), f"{name}.{size}", repeats, group)
        seconds.append(statistics.median(taken))
        if seconds[-1] > MAX_PROBE_SECONDS:
            break
    return NetworkModel(ranks, *fit_line(sent, seconds))


def time_all_reduces(tensor: torch.Tensor, name: str, repeats: int, group: collectives.Group = None) -> list[float]:
    """Time in-place all-reduces, after one that does not count; return each one's seconds, the slowest rank's."""
    seconds = []
    for _ in range(repeats + 1):
        # All begin together: otherwise the first rank would measure how long it waits for the last one.
        collectives.gather_json(None, f"{name}.barrier", group)
        synchronize_device(tensor.device)
        begin = time.perf_counter()
        collectives.wait(collectives.all_reduce_async_(tensor, name, group=group))
        synchronize_device(tensor.device)
        seconds.append(time.perf_counter() - begin)
    return [max(column) for column in zip(*collectives.gather_json(seconds[1:], f"{name}.seconds", group), strict=True)]


def fit_line(sent: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Return latency and bandwidth of the line through the smallest and the largest size, the first and last given.

    If the largest hardly takes longer than the smallest, a tenth of its time is attributed to its bytes.
    """
    more = max(seconds[-1] - seconds[0], seconds[-1] / 10)
    bandwidth = (sent[-1] - sent[0]) / more
    return max(seconds[0] - sent[0] / bandwidth, 0.0), bandwidth


def synchronize_device(device: torch.device) -> None:
    """Wait until a GPU has done everything that was started on it; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
