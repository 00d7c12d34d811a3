"""What each way to compress gradients costs and wins: measured here, and predicted for other networks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.bench.allreduce import format_bandwidth
from hvdtrain.bench.plot import plot_step_times
from hvdtrain.bench.workload import (
    WARM_UP_STEPS,
    Workload,
    compute_gradients,
    copy_model,
    describe_world,
    make_distributed_optimizer,
    max_over_ranks,
    prepare_workload,
    print_on_root,
    slowest_rank_medians,
    time_step,
)
from hvdtrain.comm import collectives, network_model
from hvdtrain.comm.network_model import NetworkModel
from hvdtrain.comm.world import World
from hvdtrain.compression import cost_model
from hvdtrain.compression.cost_model import BucketCost
from hvdtrain.exchange.advisor import cost_of_method
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.recipe.base import Recipe
from hvdtrain.system.errors import RunError
from hvdtrain.system.extras import explain_missing_extra
from hvdtrain.system.files import write_atomically, write_json
from hvdtrain.training.options import RunOptions

UNCOMPRESSED_STEPS = (
    6  # steps with a method's buckets before it compresses; the last four tell when each bucket is ready
)
RECORDED_STEPS = (
    4  # steps whose gradients are compared: an even number, for methods that send one of two factors in turns
)
# Bytes a second: 10 Mbit/s to 100 Gbit/s, twenty to the decade.
BANDWIDTHS = [10 ** (7 + i / 20) / 8 for i in range(81)]


@dataclass(frozen=True)
class MethodMeasurement:
    """What was measured of a method; the same on all ranks."""

    spec: str
    ready_seconds: list[float]  # seconds from a step's begin until each bucket has all its gradients
    backward_seconds: float  # until the backward pass is over
    update_seconds: float  # seconds of the optimizer
    bucket_costs: list[BucketCost]  # of the buckets
    wire_bytes: float  # sent by a rank in a step
    cosine: float  # between what was applied and the exact mean
    step_seconds: float  # of a step

    def predict_step_seconds(self, network: NetworkModel) -> float:
        """Seconds of a step."""
        return (
            cost_model.predict_step_time(self.ready_seconds, self.backward_seconds, self.bucket_costs, network)
            + self.update_seconds
        )


def benchmark_compression(
    world: World,
    recipe: Recipe,
    options: RunOptions,
    specs: Sequence[str],
    steps: int,
    plot: Path,
    json_path: Path | None,
) -> None:
    """Print a row for each method, none first, and write the plot, and the rows as JSON if there is a path."""
    work = prepare_workload(recipe, options, world)
    network = network_model.measure_network("bench.network", device=work.device)
    title = (
        f"{type(recipe).__name__}, {describe_world(world, work.device)}; network "
        f"{format_bandwidth(network.bandwidth)}, {network.latency * 1e3:.3g} ms a collective"
    )
    print_on_root(world, f"# {title}; medians of {steps} steps")
    print_on_root(
        world, "#                                                            step ms              times none's speed"
    )
    print_on_root(
        world, "method            sent MB  encode ms  decode ms   cosine  predicted   measured  predicted   measured"
    )
    methods: list[MethodMeasurement] = []
    rows: list[dict[str, Any]] = []
    for spec in ["none", *(spec for spec in dict.fromkeys(specs) if spec != "none")]:
        method = measure_method(work, spec, steps)
        methods.append(method)
        predicted, none = method.predict_step_seconds(network), methods[0]
        row: dict[str, Any] = {
            "method": spec,
            "wire_bytes": method.wire_bytes,
            "encode_seconds": sum(part.encode_seconds for part in method.bucket_costs),
            "decode_seconds": sum(part.decode_seconds for part in method.bucket_costs),
            "cosine": method.cosine,
            "predicted_step_seconds": predicted,
            "measured_step_seconds": method.step_seconds,
            "predicted_gain": none.predict_step_seconds(network) / predicted,
            "measured_gain": none.step_seconds / method.step_seconds,
        }
        rows.append(row)
        print_on_root(
            world,
            f"{spec:16}  {row['wire_bytes'] / 1e6:7.3f}  {row['encode_seconds'] * 1e3:9.2f}  "
            f"{row['decode_seconds'] * 1e3:9.2f}  {row['cosine']:7.4f}  {predicted * 1e3:9.1f}  "
            f"{method.step_seconds * 1e3:9.1f}  {row['predicted_gain']:9.2f}  {row['measured_gain']:9.2f}",
        )
    if world.rank != 0:
        return
    curves = {
        method.spec: [method.predict_step_seconds(replace(network, bandwidth=bandwidth)) for bandwidth in BANDWIDTHS]
        for method in methods
    }
    measured = {method.spec: method.step_seconds for method in methods}
    told = {"latency_seconds": network.latency, "bytes_per_second": network.bandwidth}
    missing = None
    try:
        picture: bytes | None = plot_step_times(title, BANDWIDTHS, curves, network.bandwidth, measured)
    except ModuleNotFoundError as error:
        picture, missing = None, explain_missing_extra(error)
        if missing is None:
            raise
    try:
        if picture is not None:
            write_atomically(plot, picture)
        if json_path is not None:
            write_json(json_path, {"title": title, "ranks": world.size, "network": told, "rows": rows})
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}") from error
    print_on_root(world, f"# plot: {plot}" if picture is not None else f"# no plot: {missing}")


def measure_method(work: Workload, spec: str, steps: int) -> MethodMeasurement:
    """Train with a method for some steps, first plainly, then compressing; the slowest rank's medians."""
    model = copy_model(work)
    # A warm-up cuts the gradients into the method's buckets, and neither encodes nor remembers.
    optimizer = make_distributed_optimizer(work, model, f"{spec},warmup={UNCOMPRESSED_STEPS}")
    exchange: BucketedExchange = optimizer.exchange
    collectives.barrier("bench.begin")
    moments = []
    for _ in range(UNCOMPRESSED_STEPS):
        begin = time_step(work, model, optimizer).start_time
        moments.append(
            [at - begin for at in (*(bucket.ready_time for bucket in exchange.buckets), exchange.backward_end)]
        )
    columns = zip(*moments[UNCOMPRESSED_STEPS - RECORDED_STEPS :], strict=True)
    *ready, end = max_over_ranks("bench.ready", [statistics.median(column) for column in columns])
    costs = [cost_of_method(exchange, number, bucket.method) for number, bucket in enumerate(exchange.buckets)]
    if len(exchange.flags.flat):
        # Which parameters were used travels apart from compressed gradients, at the end.
        ready.append(end)
        costs.append(BucketCost("none", 0.0, 0.0, exchange.flags.wire_bytes, 1))
    taken, sent = [], []
    for _ in range(WARM_UP_STEPS + steps):
        taken.append(time_step(work, model, optimizer))
        sent.append(optimizer.wire_bytes)
    seconds, _, update = slowest_rank_medians("bench.medians", taken[WARM_UP_STEPS:])
    alike = [measure_cosine(work, model, optimizer) for _ in range(RECORDED_STEPS)]
    return MethodMeasurement(spec, ready, end, update, costs, sum(sent[-2:]) / 2, statistics.mean(alike), seconds)


def measure_cosine(work: Workload, model: nn.Module, optimizer: Any) -> float:
    """Make a step; the cosine between the gradient that it applies and the exact mean of the ranks' gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    own: dict[nn.Parameter, Tensor] = {}
    # These see a gradient before the exchange does.
    hooks = [p.register_hook(lambda grad, p=p: own.update({p: grad.detach().clone()})) for p in params]
    compute_gradients(work, model, optimizer)
    for hook in hooks:
        hook.remove()
    optimizer.synchronize()
    exact = collectives.wait(
        collectives.all_reduce_async_(
            flatten_gradients([own.get(p) for p in params], params), "bench.exact", average=True
        )
    )
    applied = flatten_gradients([p.grad for p in params], params)
    optimizer.step()
    product = torch.dot(applied.double(), exact.double())
    return float(product / (applied.double().norm() * exact.double().norm()).clamp_min(1e-300))


def flatten_gradients(gradients: Sequence[Tensor | None], params: Sequence[nn.Parameter]) -> Tensor:
    """(n,) float32: gradients one behind the other, zeros where there is none."""
    parts = [
        torch.zeros_like(p) if grad is None else grad.to_dense() for grad, p in zip(gradients, params, strict=True)
    ]
    return torch.cat([part.reshape(-1).float() for part in parts])
