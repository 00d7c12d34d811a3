"""What joins hosts, measured: how busy each is, every link both ways, an all-reduce over each pair."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hvdtrain.doctor.meeting import Meeting
from hvdtrain.doctor.peer import Reply
from hvdtrain.system.signed_http import new_secret

ALL_PAIRS = 6  # hosts; of more, the ring and what is odd
TRIES = 2  # more, of what is odd, with nothing else going on: the best one counts
LINK_SECONDS, REDUCE_SECONDS = 15.0, 90.0
SEND_SECONDS = (0.25, 1.0)  # over each way, and where it is tried again
BUSY = 1.5

Pair = tuple[int, int]


@dataclass
class Way:
    """From one rank to another."""

    round_trip: float | None = None  # seconds
    rate: float | None = None  # bits per second
    error: str | None = None

    def better(self, other: Way) -> Way:
        """The best of two measurements of the same way."""
        if self.error or other.error:
            return other if self.error else self
        assert self.round_trip is not None and other.round_trip is not None
        assert self.rate is not None and other.rate is not None
        # Of two that are alike, the later one was longer, and is nearer the truth.
        rate = self.rate if self.rate > 2 * other.rate else other.rate
        return Way(min(self.round_trip, other.round_trip), rate)


@dataclass
class Measured:
    """All that was measured; ranks stand for their hosts."""

    busy: dict[int, float] = field(default_factory=dict)  # how many times longer work takes than alone
    ways: dict[Pair, Way] = field(default_factory=dict)
    reduced: dict[Pair, tuple[float, bool]] = field(default_factory=dict)  # seconds, and whether the sum was right
    failed: dict[int, str] = field(default_factory=dict)  # ranks that could not all-reduce


def pairs_of(ranks: int) -> list[Pair]:
    """All pairs of few ranks, the ring of many."""
    if ranks <= ALL_PAIRS:
        return [(one, other) for other in range(ranks) for one in range(other)]
    return [*((rank, rank + 1) for rank in range(ranks - 1)), (0, ranks - 1)]


def more_pairs(ranks: int, odd: Iterable[Pair], known: Iterable[Pair]) -> list[Pair]:
    """Pairs of the hosts of odd links with others, to see whether the link or the host is bad."""
    bad = {rank for pair in odd for rank in pair}
    well = [rank for rank in range(ranks) if rank not in bad][:3]
    wanted = {(min(one, other), max(one, other)) for one in bad for other in well}
    return sorted(wanted - set(known))


def rounds(pairs: Sequence[Pair]) -> list[list[Pair]]:
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


def measure_busy(room: Meeting, ranks: Sequence[int]) -> dict[int, float]:
    """How busy each host is: all at once, and again, one by one, those that seem to be."""
    replies = room.tell({rank: {"do": "burn"} for rank in ranks}, LINK_SECONDS)
    found = {rank: float(reply.get("ratio", 0.0)) for rank, reply in replies.items()}
    for _ in range(TRIES):
        # Hosts that share cores keep each other busy, as long as they work at the same time.
        for rank in [rank for rank, ratio in found.items() if ratio > BUSY]:
            again = room.tell({rank: {"do": "burn"}}, LINK_SECONDS)[rank].get("ratio", found[rank])
            found[rank] = min(found[rank], float(again))
    return found


def busy_ranks(ratios: Mapping[int, float]) -> list[int]:
    """The ranks whose work takes far longer than that of half of them."""
    if len(ratios) < 2:
        return []
    usual = statistics.median_low(ratios.values())
    return [rank for rank, ratio in ratios.items() if ratio > BUSY * max(usual, 1.0)]


def measure_ways(room: Meeting, pairs: Sequence[Pair], seconds: float = SEND_SECONDS[0]) -> dict[Pair, Way]:
    """Both ways of each pair, sending for so many seconds; pairs that share no host at the same time."""
    found = {}
    for together in rounds(pairs):
        for ways in (together, [(other, one) for one, other in together]):
            commands: dict[int, Reply] = {}
            for one, other in ways:
                ticket = new_secret()  # by which the one that serves knows the other
                commands[other] = {"do": "serve", "ticket": ticket}
                to = room.ranks[other].at
                commands[one] = {"do": "link", "to": to, "ticket": ticket, "seconds": seconds}
            replies = room.tell(commands, LINK_SECONDS)
            for one, other in ways:
                found[one, other] = way(replies[one], replies[other])
    return found


def way(sender: Reply, receiver: Reply) -> Way:
    """What both ends say of a way."""
    error = sender.get("error") or receiver.get("error")
    return Way(error=str(error)) if error else Way(sender["round trip"], receiver["rate"])


def measure_again(room: Meeting, found: dict[Pair, Way], odd: Iterable[Pair]) -> None:
    """Try odd ways again, one pair at a time; the best of all tries is kept. A cut one has been tried enough."""
    for _ in range(TRIES):
        for pair in sorted({(min(way), max(way)) for way in odd if not found[way].error}):
            for ends, again in measure_ways(room, [pair], SEND_SECONDS[1]).items():
                found[ends] = found[ends].better(again)


def reduce(room: Meeting, ranks: int, pairs: Sequence[Pair], measured: Measured) -> None:
    """All-reduce over each pair, by Horovod."""
    in_rounds = [pair for together in rounds(pairs) for pair in together]
    replies = room.tell({rank: {"do": "reduce", "pairs": in_rounds} for rank in range(ranks)}, REDUCE_SECONDS)
    for rank, reply in replies.items():
        if "error" in reply:
            measured.failed[rank] = reply["error"]
        for name, (seconds, right) in reply.get("reduced", {}).items():
            one, _, other = name.partition("-")
            pair = int(one), int(other)
            before = measured.reduced.get(pair, (0.0, True))
            measured.reduced[pair] = max(seconds, before[0]), right and before[1]
