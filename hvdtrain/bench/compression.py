"""What each method of gradient compression costs and gains: measured here, and predicted for other networks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.bench.allreduce import format_bandwidth
from hvdtrain.bench.plot import plot_step_times
from hvdtrain.bench.workload import (
    WARM_UP_STEPS,
    BenchmarkPlan,
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
from hvdtrain.compression.spec import NONE
from hvdtrain.exchange.advisor import cost_of_method
from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.system.errors import RunError
from hvdtrain.system.extras import explain_missing_extra
from hvdtrain.system.files import write_atomically, write_json

# Steps with a method's buckets before it compresses; the last RECORDED_STEPS show when each bucket is ready.
UNCOMPRESSED_STEPS = 6
# Steps whose gradients are compared: an even number, for methods that send one of two factors in turns.
RECORDED_STEPS = 4
# Bytes per second: 10 Mbit/s to 100 Gbit/s, twenty to the decade.
BANDWIDTHS = [10 ** (7 + i / 20) / 8 for i in range(81)]
TABLE_HEAD = (
    "#                                                            step ms              speed-up over none",
    "method            sent MB  encode ms  decode ms   cosine  predicted   measured  predicted   measured",
)


@dataclass(frozen=True)
class MethodMeasurement:
    """What was measured of a method; the same on all ranks.

    Attributes:
        spec: of the method.
        ready_seconds: from a step's start until each bucket has all its gradients.
        backward_seconds: from a step's start until the backward pass is over.
        update_seconds: of the optimizer.
        bucket_costs: of the buckets.
        wire_bytes: sent by a rank in a step.
        cosine: between the gradients that were applied and their exact mean.
        step_seconds: of a step.
    """

    spec: str
    ready_seconds: list[float]
    backward_seconds: float
    update_seconds: float
    bucket_costs: list[BucketCost]
    wire_bytes: float
    cosine: float
    step_seconds: float

    def predict_step_seconds(self, network: NetworkModel) -> float:
        """Predict the seconds of a step on a network."""
        exchange = cost_model.predict_step_time(self.ready_seconds, self.backward_seconds, self.bucket_costs, network)
        return exchange + self.update_seconds


@dataclass(frozen=True)
class CompressionRow:
    """A row of the table; its fields are keys of the JSON file. A gain is the step time of none over the method's."""

    method: str
    wire_bytes: float
    encode_seconds: float
    decode_seconds: float
    cosine: float
    predicted_step_seconds: float
    measured_step_seconds: float
    predicted_gain: float
    measured_gain: float

    def format_row(self) -> str:
        """Return the row as text."""
        return (
            f"{self.method:16}  {self.wire_bytes / 1e6:7.3f}  {self.encode_seconds * 1e3:9.2f}  "
            f"{self.decode_seconds * 1e3:9.2f}  {self.cosine:7.4f}  {self.predicted_step_seconds * 1e3:9.1f}  "
            f"{self.measured_step_seconds * 1e3:9.1f}  {self.predicted_gain:9.2f}  {self.measured_gain:9.2f}"
        )


def benchmark_compression(world: World, plan: BenchmarkPlan, plot: Path) -> None:
    """Print a row for each method, none first; write a plot, and the rows as JSON if the plan has a path for them.

    Args:
        world: of this rank.
        plan: what is trained and measured.
        plot: where rank 0 writes the plot, as PNG.

    Raises:
        RunError: a file cannot be written.
    """
    work = prepare_workload(plan, world)
    network = network_model.measure_network("bench.network", device=work.device)
    title = (
        f"{type(plan.recipe).__name__}, {describe_world(world, work.device)}; network "
        f"{format_bandwidth(network.bandwidth)}, {network.latency * 1e3:.3g} ms a collective"
    )
    print_on_root(world, f"# {title}; medians of {plan.steps} steps")
    for line in TABLE_HEAD:
        print_on_root(world, line)
    methods: list[MethodMeasurement] = []
    rows: list[CompressionRow] = []
    for spec in [NONE, *(spec for spec in dict.fromkeys(plan.specs) if spec != NONE)]:
        methods.append(measure_method(work, spec, plan.steps))
        rows.append(build_row(methods[-1], methods[0], network))
        print_on_root(world, rows[-1].format_row())
    if world.rank != 0:
        return
    picture, missing = try_plot(title, methods, network)
    try:
        if picture is not None:
            write_atomically(plot, picture)
        if plan.json_path is not None:
            measured = {"latency_seconds": network.latency, "bytes_per_second": network.bandwidth}
            content = {"title": title, "ranks": world.size, "network": measured, "rows": [asdict(row) for row in rows]}
            write_json(plan.json_path, content)
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}") from error
    print_on_root(world, f"# plot: {plot}" if picture is not None else f"# no plot: {missing}")


def build_row(method: MethodMeasurement, none: MethodMeasurement, network: NetworkModel) -> CompressionRow:
    """Return the row of a method.

    Args:
        method: measured.
        none: measured without compression.
        network: on which both were measured.
    """
    predicted = method.predict_step_seconds(network)
    return CompressionRow(
        method=method.spec,
        wire_bytes=method.wire_bytes,
        encode_seconds=sum(cost.encode_seconds for cost in method.bucket_costs),
        decode_seconds=sum(cost.decode_seconds for cost in method.bucket_costs),
        cosine=method.cosine,
        predicted_step_seconds=predicted,
        measured_step_seconds=method.step_seconds,
        predicted_gain=none.predict_step_seconds(network) / predicted,
        measured_gain=none.step_seconds / method.step_seconds,
    )


def try_plot(
    title: str, methods: Sequence[MethodMeasurement], network: NetworkModel
) -> tuple[bytes | None, str | None]:
    """Return a plot of the methods' step times against bandwidth, or None and how to install what it needs."""
    curves = {
        method.spec: [method.predict_step_seconds(replace(network, bandwidth=bandwidth)) for bandwidth in BANDWIDTHS]
        for method in methods
    }
    measured = {method.spec: method.step_seconds for method in methods}
    try:
        return plot_step_times(title, BANDWIDTHS, curves, network.bandwidth, measured), None
    except ModuleNotFoundError as error:
        missing = explain_missing_extra(error)
        if missing is None:
            raise
        return None, missing


def measure_method(work: Workload, spec: str, steps: int) -> MethodMeasurement:
    """Train with a method for some steps, first without compressing; return the slowest rank's medians."""
    model = copy_model(work)
    # A warm-up has the method's buckets, but does not encode anything or keep a residual.
    optimizer = make_distributed_optimizer(work, model, f"{spec},warmup={UNCOMPRESSED_STEPS}")
    exchange: BucketedExchange = optimizer.exchange
    collectives.barrier("bench.begin")
    times = []
    for _ in range(UNCOMPRESSED_STEPS):
        begin = time_step(work, model, optimizer).start_time
        ends = (*(bucket.ready_time for bucket in exchange.buckets), exchange.backward_end)
        times.append([end - begin for end in ends])
    columns = zip(*times[UNCOMPRESSED_STEPS - RECORDED_STEPS :], strict=True)
    *ready, end = max_over_ranks("bench.ready", [statistics.median(column) for column in columns])
    costs = [cost_of_method(exchange, number, bucket.method) for number, bucket in enumerate(exchange.buckets)]
    if len(exchange.flags.flat):
        # The flags of which parameters were used are reduced on their own, at the end.
        ready.append(end)
        costs.append(BucketCost(NONE, 0.0, 0.0, exchange.flags.wire_bytes, 1))
    timings, sent = [], []
    for _ in range(WARM_UP_STEPS + steps):
        timings.append(time_step(work, model, optimizer))
        sent.append(optimizer.wire_bytes)
    seconds, _, update = slowest_rank_medians("bench.medians", timings[WARM_UP_STEPS:])
    cosines = [measure_cosine(work, model, optimizer) for _ in range(RECORDED_STEPS)]
    return MethodMeasurement(spec, ready, end, update, costs, sum(sent[-2:]) / 2, statistics.mean(cosines), seconds)


def measure_cosine(work: Workload, model: nn.Module, optimizer: Any) -> float:
    """Make a step and return the cosine between the gradient that it applies and the exact mean over the ranks."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    own: dict[nn.Parameter, Tensor] = {}
    # Hooks see a gradient before the exchange does.
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
    """Return (n,) float32: the gradients one after the other, zeros for a parameter without one."""
    parts = [
        torch.zeros_like(p) if grad is None else grad.to_dense() for grad, p in zip(gradients, params, strict=True)
    ]
    return torch.cat([part.reshape(-1).float() for part in parts])
