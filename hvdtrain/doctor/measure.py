"""What joins hosts, measured: how busy each is, every link both ways, an all-reduce over each pair."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hvdtrain.doctor.meeting import Coordinator
from hvdtrain.doctor.peer import WorkerMessage
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.signed_http import new_secret

MAX_HOSTS_ALL_PAIRS = 6  # hosts; of more, the ring and what is odd
EXTRA_TRIES = 2  # more, of what is odd, with nothing else going on: the best one counts
LINK_SEND_SECONDS = (0.25, 1.0)  # over each way, and where it is tried again
BUSY_FACTOR = 1.5

Pair = tuple[int, int]


@dataclass
class LinkMeasurement:
    """From one rank to another."""

    round_trip: float | None = None  # seconds
    rate: float | None = None  # bits per second
    error: str | None = None

    def merge_best(self, other: LinkMeasurement) -> LinkMeasurement:
        """The best of two measurements of the same way."""
        if self.error or other.error:
            return other if self.error else self
        assert self.round_trip is not None and other.round_trip is not None
        assert self.rate is not None and other.rate is not None
        # Of two that are alike, the later one was longer, and is nearer the truth.
        rate = self.rate if self.rate > 2 * other.rate else other.rate
        return LinkMeasurement(min(self.round_trip, other.round_trip), rate)


@dataclass
class NetworkMeasurements:
    """All that was measured; ranks stand for their hosts."""

    cpu_slowdowns: dict[int, float] = field(default_factory=dict)  # how many times longer work takes than alone
    links: dict[Pair, LinkMeasurement] = field(default_factory=dict)
    all_reduces: dict[Pair, tuple[float, bool]] = field(default_factory=dict)  # seconds, and whether the sum was right
    all_reduce_errors: dict[int, str] = field(default_factory=dict)  # ranks that could not all-reduce


def choose_pairs(ranks: int) -> list[Pair]:
    """All pairs of few ranks, the ring of many."""
    if ranks <= MAX_HOSTS_ALL_PAIRS:
        return [(one, other) for other in range(ranks) for one in range(other)]
    return [*((rank, rank + 1) for rank in range(ranks - 1)), (0, ranks - 1)]


def choose_extra_pairs(ranks: int, odd: Iterable[Pair], known: Iterable[Pair]) -> list[Pair]:
    """Pairs of the hosts of odd links with others, to see whether the link or the host is bad."""
    bad = {rank for pair in odd for rank in pair}
    well = [rank for rank in range(ranks) if rank not in bad][:3]
    wanted = {(min(one, other), max(one, other)) for one in bad for other in well}
    return sorted(wanted - set(known))


def schedule_rounds(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs in rounds, in each of which no rank is twice."""
    found: list[list[Pair]] = []
    for pair in pairs:
        for one in found:
            if not any(set(pair) & set(other) for other in one):
                one.append(pair)
                break
        else:
            found.append([pair])
    return found


def measure_cpu_slowdowns(room: Coordinator, ranks: Sequence[int]) -> dict[int, float]:
    """How busy each host is: all at once, and again, one by one, those that seem to be."""
    replies = room.run_commands({rank: {"do": "burn"} for rank in ranks}, DoctorLimits.command)
    found = {rank: float(reply.get("ratio", 0.0)) for rank, reply in replies.items()}
    for _ in range(EXTRA_TRIES):
        # Hosts that share cores keep each other busy, as long as they work at the same time.
        for rank in [rank for rank, ratio in found.items() if ratio > BUSY_FACTOR]:
            again = room.run_commands({rank: {"do": "burn"}}, DoctorLimits.command)[rank].get("ratio", found[rank])
            found[rank] = min(found[rank], float(again))
    return found


def busy_ranks(ratios: Mapping[int, float]) -> list[int]:
    """The ranks whose work takes far longer than that of half of them."""
    if len(ratios) < 2:
        return []
    usual = statistics.median_low(ratios.values())
    return [rank for rank, ratio in ratios.items() if ratio > BUSY_FACTOR * max(usual, 1.0)]


def measure_links(
    room: Coordinator, pairs: Sequence[Pair], seconds: float = LINK_SEND_SECONDS[0]
) -> dict[Pair, LinkMeasurement]:
    """Both ways of each pair, sending for so many seconds; pairs that share no host at the same time."""
    found = {}
    for together in schedule_rounds(pairs):
        for ways in (together, [(other, one) for one, other in together]):
            commands: dict[int, WorkerMessage] = {}
            for one, other in ways:
                ticket = new_secret()  # by which the one that serves knows the other
                commands[other] = {"do": "serve", "ticket": ticket}
                to = room.workers[other].listen_address
                commands[one] = {"do": "link", "to": to, "ticket": ticket, "seconds": seconds}
            replies = room.run_commands(commands, DoctorLimits.command)
            for one, other in ways:
                found[one, other] = build_link_measurement(replies[one], replies[other])
    return found


def build_link_measurement(sender: WorkerMessage, receiver: WorkerMessage) -> LinkMeasurement:
    """What both ends say of a way."""
    error = sender.get("error") or receiver.get("error")
    return LinkMeasurement(error=str(error)) if error else LinkMeasurement(sender["round trip"], receiver["rate"])


def remeasure_links(room: Coordinator, found: dict[Pair, LinkMeasurement], odd: Iterable[Pair]) -> None:
    """Try odd ways again, one pair at a time; the best of all tries is kept. A cut one has been tried enough."""
    for _ in range(EXTRA_TRIES):
        for pair in sorted({(min(way), max(way)) for way in odd if not found[way].error}):
            for ends, again in measure_links(room, [pair], LINK_SEND_SECONDS[1]).items():
                found[ends] = found[ends].merge_best(again)


def measure_all_reduces(room: Coordinator, ranks: int, pairs: Sequence[Pair], measured: NetworkMeasurements) -> None:
    """All-reduce over each pair, by Horovod."""
    in_rounds = [pair for together in schedule_rounds(pairs) for pair in together]
    replies = room.run_commands(
        {rank: {"do": "reduce", "pairs": in_rounds} for rank in range(ranks)}, DoctorLimits.all_reduce
    )
    for rank, reply in replies.items():
        if "error" in reply:
            measured.all_reduce_errors[rank] = reply["error"]
        for name, (seconds, right) in reply.get("reduced", {}).items():
            one, _, other = name.partition("-")
            pair = int(one), int(other)
            before = measured.all_reduces.get(pair, (0.0, True))
            measured.all_reduces[pair] = max(seconds, before[0]), right and before[1]
