"""Which host or link is bad, from what was measured between them: the one that is far from the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence

from hvdtrain.doctor.findings import Finding, worst_first
from hvdtrain.doctor.measure import Measured, Pair, Way, busy_ranks

SLOWER = 5.0  # times, than the others, is odd: a cable that fell back to a lower speed is ten times slower
LATE_SECONDS = 1e-3  # a longer round trip is odd if it is that much more, too
REDUCE_LATE_SECONDS = 0.05


def odd_ways(ways: Mapping[Pair, Way]) -> list[Pair]:
    """The ways that failed, or that are far slower than others."""
    return [pair for pair, way in ways.items() if way.error] + slow(ways) + late(ways)


def slow(ways: Mapping[Pair, Way]) -> list[Pair]:
    """The ways that carry far less than others do."""
    rates = {pair: way.rate for pair, way in ways.items() if way.rate is not None}
    usual = upper_quarter(rates.values())
    return [pair for pair, rate in rates.items() if rate * SLOWER < usual]


def late(ways: Mapping[Pair, Way]) -> list[Pair]:
    """The ways whose round trips take far longer than others'."""
    trips = {pair: way.round_trip for pair, way in ways.items() if way.round_trip is not None}
    usual = -upper_quarter([-trip for trip in trips.values()])
    return [pair for pair, trip in trips.items() if trip > max(SLOWER * usual, usual + LATE_SECONDS)]


def upper_quarter(values: Collection[float]) -> float:
    """What a quarter of the values are not below: of three hosts, half of the links may be one bad host's."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * 3 // 4, len(ordered) - 1)] if ordered else 0.0


def judge(measured: Measured, hosts: Sequence[str]) -> list[Finding]:
    """What is wrong with hosts and links, the worst first; `hosts` are the names of the ranks."""
    ways = measured.ways
    cut = [pair for pair, way in ways.items() if way.error]
    found = tell(cut, ways, hosts, lambda pairs: cut_text(pairs, ways, hosts))
    busy = busy_ranks(measured.busy)
    for rank in busy:
        others = statistics.median(ratio for other, ratio in measured.busy.items() if other not in busy)
        text = f"it is busy: work takes {measured.busy[rank]:.1f} times as long as alone, on the others {others:.1f}"
        found.append(Finding(f"host {hosts[rank]}", text))
    # What is slow because of a busy host is no news.
    free = {pair: way for pair, way in ways.items() if not set(pair) & set(busy) and not way.error}
    slower = slow(free)
    found += tell(slower, free, hosts, lambda pairs: slow_text(pairs, slower, free))
    later = [pair for pair in late(free) if pair not in slower and pair[::-1] not in slower]
    found += tell(later, free, hosts, lambda pairs: late_text(pairs, later, free))
    explained = {frozenset(pair) for pair in [*cut, *slower, *later]}
    found += reduced(measured, hosts, explained, busy)
    return worst_first(found)


def tell(
    bad: Sequence[Pair], ways: Mapping[Pair, Way], hosts: Sequence[str], words: Callable[[Sequence[Pair]], str]
) -> list[Finding]:
    """Bad ways as findings: of a host where all its links are bad, else of each link."""
    left, found = list(bad), []
    for rank, host in enumerate(hosts):
        for its in ([pair for pair in ways if pair[0] == rank], [pair for pair in ways if pair[1] == rank]):
            # Of one link nobody knows which end it is. A host that others have explained is not bad itself.
            if len(its) > 1 and all(pair in bad for pair in its) and any(pair in left for pair in its):
                mine = [pair for pair in bad if rank in pair]
                if not any(elsewhere(pair, bad, ways, rank) for pair in mine):
                    found.append(Finding(f"host {host}", words(mine)))
                    left = [pair for pair in left if rank not in pair]
    for pair in list(left):
        if pair in left:
            both = [way for way in (pair, pair[::-1]) if way in left]
            found.append(Finding(f"link {hosts[min(pair)]}-{hosts[max(pair)]}", words(both)))
            left = [way for way in left if way not in both]
    return found


def elsewhere(pair: Pair, bad: Sequence[Pair], ways: Mapping[Pair, Way], rank: int) -> bool:
    """Whether the other end of a bad way is bad to more hosts than this one is, so that it explains the way."""
    other = pair[0] if pair[1] == rank else pair[1]
    return share(other, bad, ways) > share(rank, bad, ways)


def share(rank: int, bad: Sequence[Pair], ways: Mapping[Pair, Way]) -> float:
    """How much of a host's ways is bad."""
    its = [pair for pair in ways if rank in pair]
    return sum(pair in bad for pair in its) / len(its)


def cut_text(pairs: Sequence[Pair], ways: Mapping[Pair, Way], hosts: Sequence[str]) -> str:
    """Which connections fail, and how the first of them does."""
    one, other = pairs[0]
    if len(pairs) == 1:
        what = f"{hosts[one]} cannot connect to {hosts[other]}"
    elif len(pairs) == 2 and pairs[1] == (other, one):
        what = f"{hosts[one]} and {hosts[other]} cannot connect to each other"
    else:
        what = f"{len(pairs)} of its connections fail, the first from {hosts[one]} to {hosts[other]}"
    return f"{what}: {ways[one, other].error}; is there a firewall?"


def slow_text(pairs: Sequence[Pair], slower: Sequence[Pair], ways: Mapping[Pair, Way]) -> str:
    """How slow, against the others."""
    its = statistics.median(ways[pair].rate or 0.0 for pair in pairs)
    others = statistics.median(way.rate or 0.0 for pair, way in ways.items() if pair not in slower)
    sends, receives = ({pair[end] for pair in pairs} for end in (0, 1))
    what = "sends " if len(sends) < len(receives) else "receives " if len(receives) < len(sends) else ""
    return f"{what}{megabits(its)} Mbit/s, the others {megabits(others)}"


def late_text(pairs: Sequence[Pair], later: Sequence[Pair], ways: Mapping[Pair, Way]) -> str:
    """How late, against the others."""
    its = statistics.median(ways[pair].round_trip or 0.0 for pair in pairs)
    others = statistics.median(way.round_trip or 0.0 for pair, way in ways.items() if pair not in later)
    return f"a round trip takes {1e3 * its:.3g} ms, on the others {1e3 * others:.3g}"


def megabits(rate: float) -> str:
    """Bits per second as Mbit/s, in three digits."""
    return f"{rate / 1e6:.3g}" if rate < 1e9 else f"{rate / 1e6:.0f}"


def reduced(
    measured: Measured, hosts: Sequence[str], explained: Collection[frozenset[int]], busy: Sequence[int]
) -> list[Finding]:
    """All-reduces that failed, were wrong, or far slower than their link explains."""
    found = []
    for rank, error in measured.failed.items():
        found.append(Finding(f"host {hosts[rank]}", f"its rank cannot all-reduce: {error}"))
    seconds = {pair: taken for pair, (taken, _) in measured.reduced.items()}
    usual = statistics.median_low(seconds.values()) if seconds else 0.0
    for pair, (taken, right) in measured.reduced.items():
        where = f"link {hosts[min(pair)]}-{hosts[max(pair)]}"
        if not right:
            found.append(Finding(where, "the sum of an all-reduce is wrong"))
        elif taken > max(2 * SLOWER * usual, usual + REDUCE_LATE_SECONDS) and not (
            frozenset(pair) in explained or set(pair) & set(busy)
        ):
            text = f"an all-reduce takes {1e3 * taken:.3g} ms, over the others {1e3 * usual:.3g}"
            found.append(Finding(where, text, bad=False))
    return found
