"""What the network test measures, and in which order: CPUs, links, all-reduces; again what is far from the others."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hvdtrain.diagnosis.links import OUTLIER_FACTOR, find_slow_rates, upper_quartile
from hvdtrain.doctor.network_test.coordinator import Coordinator
from hvdtrain.doctor.network_test.messages import (
    AllReduceReply,
    Command,
    CpuReply,
    Failure,
    MeasureCpu,
    Pair,
    ProbeLink,
    ProbeReply,
    Reply,
    RunAllReduces,
    ServeProbe,
    ServeReply,
)
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.signed_http import new_secret

MAX_HOSTS_ALL_PAIRS = 6  # of more hosts, only the pairs of a ring and those of outliers are measured
EXTRA_TRIES = 2  # of outliers, with nothing else going on; the best try counts
SEND_SECONDS, RETRY_SEND_SECONDS = 0.25, 1.0  # in each direction of a link
BUSY_FACTOR = 1.5
MIN_EXTRA_ROUND_TRIP = 1e-3  # seconds that an outlier's round trip is longer, too


@dataclass(frozen=True)
class LinkMeasurement:
    """One direction of a link.

    Attributes:
        round_trip: in seconds; None if there is an error.
        rate: in bits per second; None if there is an error.
        error: why it could not be measured.
    """

    round_trip: float | None = None
    rate: float | None = None
    error: str | None = None

    def merge_best(self, later: LinkMeasurement) -> LinkMeasurement:
        """Return the best of this and a later, longer measurement of the same direction."""
        if self.error or later.error:
            return later if self.error else self
        assert self.round_trip is not None and later.round_trip is not None
        assert self.rate is not None and later.rate is not None
        # If both are alike, the longer one is more exact.
        rate = self.rate if self.rate > 2 * later.rate else later.rate
        return LinkMeasurement(min(self.round_trip, later.round_trip), rate)


@dataclass(frozen=True)
class AllReduceMeasurement:
    """All-reduces over a pair: the slower rank's seconds, and whether the sum was right on both."""

    seconds: float
    right: bool


@dataclass
class NetworkMeasurements:
    """All that was measured.

    Attributes:
        cpu_slowdowns: by rank, against an idle host.
        links: by direction.
        all_reduces: by pair.
        all_reduce_errors: by rank, why it could not all-reduce.
    """

    cpu_slowdowns: dict[int, float] = field(default_factory=dict)
    links: dict[Pair, LinkMeasurement] = field(default_factory=dict)
    all_reduces: dict[Pair, AllReduceMeasurement] = field(default_factory=dict)
    all_reduce_errors: dict[int, str] = field(default_factory=dict)

    def measured_pairs(self) -> list[Pair]:
        """Return the pairs whose links were measured, the smaller rank first."""
        return sorted({(min(pair), max(pair)) for pair in self.links})


def run_network_test(coordinator: Coordinator) -> NetworkMeasurements:
    """Measure what joins the hosts of the workers."""
    count = coordinator.size
    pairs = choose_pairs(count)
    measured = NetworkMeasurements(measure_cpu_slowdowns(coordinator), measure_links(coordinator, pairs))
    remeasure_links(coordinator, measured.links, outlier_links(measured.links))
    more = choose_extra_pairs(count, outlier_links(measured.links), pairs)
    if more:
        measured.links |= measure_links(coordinator, more)
        outliers = [pair for pair in outlier_links(measured.links) if (min(pair), max(pair)) in more]
        remeasure_links(coordinator, measured.links, outliers)
    # Horovod connects all ranks: over a broken link it would not start.
    if not any(link.error for link in measured.links.values()):
        measure_all_reduces(coordinator, measured)
    return measured


def choose_pairs(ranks: int) -> list[Pair]:
    """Return all pairs of few ranks, the ring of many."""
    if ranks <= MAX_HOSTS_ALL_PAIRS:
        return [(one, other) for other in range(ranks) for one in range(other)]
    return [*((rank, rank + 1) for rank in range(ranks - 1)), (0, ranks - 1)]


def choose_extra_pairs(ranks: int, outliers: Iterable[Pair], known: Iterable[Pair]) -> list[Pair]:
    """Return pairs of the ranks of outliers with other ranks, which show whether the link or the host is bad."""
    suspects = {rank for pair in outliers for rank in pair}
    others = [rank for rank in range(ranks) if rank not in suspects][:3]
    wanted = {(min(one, other), max(one, other)) for one in suspects for other in others}
    return sorted(wanted - set(known))


def schedule_rounds(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Return the pairs in rounds, each of which has no rank twice."""
    rounds: list[list[Pair]] = []
    for pair in pairs:
        for one in rounds:
            if not any(set(pair) & set(other) for other in one):
                one.append(pair)
                break
        else:
            rounds.append([pair])
    return rounds


def measure_cpu_slowdowns(coordinator: Coordinator) -> dict[int, float]:
    """Measure all CPUs at once, and those that seem to be busy again, one by one; by rank."""
    commands: dict[int, Command] = {rank: MeasureCpu() for rank in range(coordinator.size)}
    replies = coordinator.run_commands(commands, DoctorLimits.command)
    found = {rank: reply.slowdown if isinstance(reply, CpuReply) else 0.0 for rank, reply in replies.items()}
    for _ in range(EXTRA_TRIES):
        # Hosts that share cores slow each other down as long as they work at the same time.
        for rank in [rank for rank, slowdown in found.items() if slowdown > BUSY_FACTOR]:
            reply = coordinator.run_commands({rank: MeasureCpu()}, DoctorLimits.command)[rank]
            if isinstance(reply, CpuReply):
                found[rank] = min(found[rank], reply.slowdown)
    return found


def busy_ranks(slowdowns: Mapping[int, float]) -> list[int]:
    """Return the ranks whose CPU slowdown is far above the median."""
    if len(slowdowns) < 2:
        return []
    usual = statistics.median_low(slowdowns.values())
    return [rank for rank, slowdown in slowdowns.items() if slowdown > BUSY_FACTOR * max(usual, 1.0)]


def measure_links(
    coordinator: Coordinator, pairs: Sequence[Pair], seconds: float = SEND_SECONDS
) -> dict[Pair, LinkMeasurement]:
    """Measure both directions of each pair, sending for some seconds; pairs that share no host at the same time."""
    found = {}
    for together in schedule_rounds(pairs):
        for directions in (together, [(other, one) for one, other in together]):
            commands: dict[int, Command] = {}
            for sender, receiver in directions:
                ticket = new_secret()  # by which the receiver knows the sender
                address = coordinator.workers[receiver].listen_address
                commands[receiver] = ServeProbe(ticket)
                commands[sender] = ProbeLink(address, ticket, seconds)
            replies = coordinator.run_commands(commands, DoctorLimits.command)
            for sender, receiver in directions:
                found[sender, receiver] = combine_replies(replies[sender], replies[receiver])
    return found


def combine_replies(sender: Reply, receiver: Reply) -> LinkMeasurement:
    """Return the measurement of a direction from the replies of both ends."""
    for reply in (sender, receiver):
        if isinstance(reply, Failure):
            return LinkMeasurement(error=reply.error)
    if isinstance(sender, ProbeReply) and isinstance(receiver, ServeReply):
        return LinkMeasurement(sender.round_trip, receiver.rate)
    return LinkMeasurement(error="unexpected reply")


def remeasure_links(coordinator: Coordinator, links: dict[Pair, LinkMeasurement], outliers: Iterable[Pair]) -> None:
    """Measure outliers again, one pair at a time, and keep the best of all tries; broken links stay as they are."""
    for _ in range(EXTRA_TRIES):
        for pair in sorted({(min(link), max(link)) for link in outliers if not links[link].error}):
            for direction, again in measure_links(coordinator, [pair], RETRY_SEND_SECONDS).items():
                links[direction] = links[direction].merge_best(again)


def measure_all_reduces(coordinator: Coordinator, measured: NetworkMeasurements) -> None:
    """All-reduce over each measured pair through Horovod."""
    pairs = [pair for together in schedule_rounds(measured.measured_pairs()) for pair in together]
    commands: dict[int, Command] = {rank: RunAllReduces(pairs) for rank in range(coordinator.size)}
    for rank, reply in coordinator.run_commands(commands, DoctorLimits.all_reduce).items():
        if isinstance(reply, Failure):
            measured.all_reduce_errors[rank] = reply.error
        elif isinstance(reply, AllReduceReply):
            for result in reply.results:
                before = measured.all_reduces.get(result.pair, AllReduceMeasurement(0.0, True))
                measured.all_reduces[result.pair] = AllReduceMeasurement(
                    max(result.seconds, before.seconds), result.right and before.right
                )


def outlier_links(links: Mapping[Pair, LinkMeasurement]) -> list[Pair]:
    """Return the directions that failed or that are far slower than others."""
    return [pair for pair, link in links.items() if link.error] + slow_links(links) + high_latency_links(links)


def slow_links(links: Mapping[Pair, LinkMeasurement]) -> list[Pair]:
    """Return the directions with a far lower rate than others."""
    return find_slow_rates({pair: link.rate for pair, link in links.items() if link.rate is not None})


def high_latency_links(links: Mapping[Pair, LinkMeasurement]) -> list[Pair]:
    """Return the directions with far longer round trips than others."""
    trips = {pair: link.round_trip for pair, link in links.items() if link.round_trip is not None}
    usual = -upper_quartile([-trip for trip in trips.values()])
    return [pair for pair, trip in trips.items() if trip > max(OUTLIER_FACTOR * usual, usual + MIN_EXTRA_ROUND_TRIP)]
