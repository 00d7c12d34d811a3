"""What a reducer costs, measured, and how long a step takes with it, predicted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm.network_model import NetworkModel, synchronize_device
from hvdtrain.compression.codec import Collective
from hvdtrain.compression.plain_reducer import PlainReducer
from hvdtrain.compression.reducer import CompressedReducer


@dataclass(frozen=True)
class BucketCost:
    """What a bucket costs a rank in each step."""

    method: str  # "none", "powersgd:4"
    encode_seconds: float  # seconds on the rank's thread before the first collective is started
    decode_seconds: float  # seconds on the rank's thread afterwards, without its waiting
    wire_bytes: int  # sent by a rank, in all rounds
    rounds: int  # collectives, one after the other: 1 or 2


def measure_cost(reducer: CompressedReducer | PlainReducer, method: str, repeats: int = 3) -> BucketCost:
    """Run a reducer that nobody else uses for some steps, on all ranks of its group; the slowest rank's medians.

    Args:
        reducer: its `flat` is overwritten.
        method: what to call it.
        repeats: steps that count; one more comes first.
    """
    flat = reducer.flat
    generator = torch.Generator(flat.device).manual_seed(collectives.rank(reducer.group))
    values = torch.randn(flat.shape, generator=generator, device=flat.device).to(flat.dtype)
    first = reducer.warmup if isinstance(reducer, CompressedReducer) else 0
    encode, decode, sent = [], [], []
    for step in range(first, first + repeats + 1):
        flat.copy_(values)
        synchronize_device(flat.device)
        begin = time.perf_counter()
        reducer.start_reduction(step)
        synchronize_device(flat.device)
        started = time.perf_counter()
        reducer.start_second_round()
        reducer.finish_reduction()
        if isinstance(reducer, CompressedReducer) and reducer.sum_is_finite():
            reducer.commit_step()
        synchronize_device(flat.device)
        decode.append(time.perf_counter() - started - reducer.waited)
        encode.append(started - begin)
        sent.append(reducer.wire_bytes)
    # Methods that send one of two factors in turns send other sizes in turns.
    mine = [statistics.median(encode[1:]), statistics.median(decode[1:]), statistics.mean(sent[-2:])]
    encoding, decoding, wire = map(
        max, zip(*collectives.gather_json(mine, f"{reducer.name}.cost", reducer.group), strict=True)
    )
    rounds = 1
    if isinstance(reducer, CompressedReducer) and reducer.codec.collective is Collective.REDUCE_SCATTER:
        rounds = 2
    return BucketCost(method, encoding, decoding, round(wire), rounds)


def predict_step_time(ready: Sequence[float], end: float, costs: Sequence[BucketCost], network: NetworkModel) -> float:
    """Predict how long forward pass, backward pass and exchange take together, in seconds.

    One thread computes, and encodes in between; one network serves the collectives in the order in which they were
    started. When all first rounds have been started, the thread makes the second ones, and then decodes.

    Args:
        ready: when each bucket has all its gradients, in seconds from the start of a step in which nothing is encoded.
        end: when the backward pass is over, in the same seconds.
        costs: of the buckets, in the same order.
        network: what it all runs on.
    """
    late = 0.0  # by how much encoding has delayed the thread against `ready` and `end`
    free = 0.0  # when the network has served what was started so far
    now = end
    arrived = [0.0] * len(costs)
    for i in sorted(range(len(costs)), key=ready.__getitem__):
        cost = costs[i]
        late += cost.encode_seconds
        started = ready[i] + late
        free = arrived[i] = max(free, started) + network.latency + cost.wire_bytes / cost.rounds / network.bandwidth
        now = max(started, end + late)
    for i, cost in enumerate(costs):
        if cost.rounds == 2:  # decoding the parts and encoding their sum is half the work that is left
            now = max(now, arrived[i]) + cost.decode_seconds / 2
            free = arrived[i] = max(free, now) + network.latency + cost.wire_bytes / 2 / network.bandwidth
    for i, cost in enumerate(costs):
        now = max(now, arrived[i]) + cost.decode_seconds / cost.rounds
    return now
