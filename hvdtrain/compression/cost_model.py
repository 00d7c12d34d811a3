"""What a way over the ranks costs, measured, and how long a step takes with it, predicted."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm.network_model import NetworkModel, synchronize_device
from hvdtrain.compression.reducer import CompressedReducer, PlainReducer


@dataclass(frozen=True)
class BucketCost:
    """What a bucket costs a rank in each step."""

    method: str  # "none", "powersgd:4"
    encode_seconds: float  # seconds on the rank's thread before the first collective is started
    decode_seconds: float  # seconds on the rank's thread afterwards, without its waiting
    wire_bytes: int  # sent by a rank, in all rounds
    rounds: int  # collectives, one after the other: 1 or 2


def measure_cost(channel: CompressedReducer | PlainReducer, method: str, repeats: int = 3) -> BucketCost:
    """Run a channel that nobody else uses for some steps, on all ranks of its group; the slowest rank's medians.

    method: what to call it. One more step comes first and does not count. `flat` is overwritten.
    """
    flat = channel.flat
    generator = torch.Generator(flat.device).manual_seed(collectives.rank(channel.group))
    values = torch.randn(flat.shape, generator=generator, device=flat.device).to(flat.dtype)
    first = channel.warmup if isinstance(channel, CompressedReducer) else 0
    encode, decode, sent = [], [], []
    for step in range(first, first + repeats + 1):
        flat.copy_(values)
        synchronize_device(flat.device)
        begin = time.perf_counter()
        channel.start_reduction(step)
        synchronize_device(flat.device)
        started = time.perf_counter()
        channel.start_second_round()
        channel.finish_reduction()
        if isinstance(channel, CompressedReducer) and channel.sum_is_finite():
            channel.commit_step()
        synchronize_device(flat.device)
        decode.append(time.perf_counter() - started - channel.waited)
        encode.append(started - begin)
        sent.append(channel.wire_bytes)
    # Methods that send one of two factors in turns send other sizes in turns.
    mine = [statistics.median(encode[1:]), statistics.median(decode[1:]), statistics.mean(sent[-2:])]
    encoding, decoding, wire = map(
        max, zip(*collectives.gather_json(mine, f"{channel.name}.cost", channel.group), strict=True)
    )
    rounds = 2 if isinstance(channel, CompressedReducer) and channel.codec.collective == "exchange" else 1
    return BucketCost(method, encoding, decoding, round(wire), rounds)


def predict_step_time(ready: Sequence[float], end: float, costs: Sequence[BucketCost], network: NetworkModel) -> float:
    """How long forward pass, backward pass and exchange take, predicted.

    ready: when each bucket has all its gradients, end: when the backward pass is over, both in seconds from the step's
    begin where nothing is encoded. costs: of the buckets, in the same order.

    One thread computes, and encodes in between; one network serves the collectives in the order in which they were
    started. When all first rounds have been started, the thread makes the second ones, and then decodes.
    """
    late = 0.0  # so much later than `ready` and `end` say is the thread by what it has encoded
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
