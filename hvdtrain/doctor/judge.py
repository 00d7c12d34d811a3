"""Which host or link is bad, from what was measured between them: the one that is far from the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence

from hvdtrain.doctor.findings import DoctorFinding, sort_by_severity
from hvdtrain.doctor.measure import LinkMeasurement, NetworkMeasurements, Pair, busy_ranks

OUTLIER_FACTOR = 5.0  # times, than the others, is odd: a cable that fell back to a lower speed is ten times slower
MIN_EXTRA_ROUND_TRIP = 1e-3  # a longer round trip is odd if it is that much more, too
MIN_EXTRA_REDUCE_TIME = 0.05


def outlier_links(ways: Mapping[Pair, LinkMeasurement]) -> list[Pair]:
    """The ways that failed, or that are far slower than others."""
    return [pair for pair, way in ways.items() if way.error] + slow_links(ways) + high_latency_links(ways)


def slow_links(ways: Mapping[Pair, LinkMeasurement]) -> list[Pair]:
    """The ways that carry far less than others do."""
    rates = {pair: way.rate for pair, way in ways.items() if way.rate is not None}
    usual = upper_quartile(rates.values())
    return [pair for pair, rate in rates.items() if rate * OUTLIER_FACTOR < usual]


def high_latency_links(ways: Mapping[Pair, LinkMeasurement]) -> list[Pair]:
    """The ways whose round trips take far longer than others'."""
    trips = {pair: way.round_trip for pair, way in ways.items() if way.round_trip is not None}
    usual = -upper_quartile([-trip for trip in trips.values()])
    return [pair for pair, trip in trips.items() if trip > max(OUTLIER_FACTOR * usual, usual + MIN_EXTRA_ROUND_TRIP)]


def upper_quartile(values: Collection[float]) -> float:
    """What a quarter of the values are not below: of three hosts, half of the links may be one bad host's."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * 3 // 4, len(ordered) - 1)] if ordered else 0.0


def diagnose_network(measured: NetworkMeasurements, hosts: Sequence[str]) -> list[DoctorFinding]:
    """What is wrong with hosts and links, the worst first; `hosts` are the names of the ranks."""
    ways = measured.links
    cut = [pair for pair, way in ways.items() if way.error]
    found = build_link_findings(cut, ways, hosts, lambda pairs: describe_failed_links(pairs, ways, hosts))
    busy = busy_ranks(measured.cpu_slowdowns)
    for rank in busy:
        others = statistics.median(ratio for other, ratio in measured.cpu_slowdowns.items() if other not in busy)
        text = (
            f"it is busy: work takes {measured.cpu_slowdowns[rank]:.1f} times as long as alone, on the others "
            f"{others:.1f}"
        )
        found.append(DoctorFinding(f"host {hosts[rank]}", text))
    # What is slow because of a busy host is no news.
    free = {pair: way for pair, way in ways.items() if not set(pair) & set(busy) and not way.error}
    slower = slow_links(free)
    found += build_link_findings(slower, free, hosts, lambda pairs: describe_slow_links(pairs, slower, free))
    later = [pair for pair in high_latency_links(free) if pair not in slower and pair[::-1] not in slower]
    found += build_link_findings(later, free, hosts, lambda pairs: describe_high_latency(pairs, later, free))
    explained = {frozenset(pair) for pair in [*cut, *slower, *later]}
    found += diagnose_all_reduces(measured, hosts, explained, busy)
    return sort_by_severity(found)


def build_link_findings(
    bad: Sequence[Pair],
    ways: Mapping[Pair, LinkMeasurement],
    hosts: Sequence[str],
    words: Callable[[Sequence[Pair]], str],
) -> list[DoctorFinding]:
    """Bad ways as findings: of a host where all its links are bad, else of each link."""
    left, found = list(bad), []
    for rank, host in enumerate(hosts):
        for its in ([pair for pair in ways if pair[0] == rank], [pair for pair in ways if pair[1] == rank]):
            # Of one link nobody knows which end it is. A host that others have explained is not bad itself.
            if len(its) > 1 and all(pair in bad for pair in its) and any(pair in left for pair in its):
                mine = [pair for pair in bad if rank in pair]
                if not any(is_explained_by_other_end(pair, bad, ways, rank) for pair in mine):
                    found.append(DoctorFinding(f"host {host}", words(mine)))
                    left = [pair for pair in left if rank not in pair]
    for pair in list(left):
        if pair in left:
            both = [way for way in (pair, pair[::-1]) if way in left]
            found.append(DoctorFinding(f"link {hosts[min(pair)]}-{hosts[max(pair)]}", words(both)))
            left = [way for way in left if way not in both]
    return found


def is_explained_by_other_end(pair: Pair, bad: Sequence[Pair], ways: Mapping[Pair, LinkMeasurement], rank: int) -> bool:
    """Whether the other end of a bad way is bad to more hosts than this one is, so that it explains the way."""
    other = pair[0] if pair[1] == rank else pair[1]
    return bad_link_fraction(other, bad, ways) > bad_link_fraction(rank, bad, ways)


def bad_link_fraction(rank: int, bad: Sequence[Pair], ways: Mapping[Pair, LinkMeasurement]) -> float:
    """How much of a host's ways is bad."""
    its = [pair for pair in ways if rank in pair]
    return sum(pair in bad for pair in its) / len(its)


def describe_failed_links(pairs: Sequence[Pair], ways: Mapping[Pair, LinkMeasurement], hosts: Sequence[str]) -> str:
    """Which connections fail, and how the first of them does."""
    one, other = pairs[0]
    if len(pairs) == 1:
        what = f"{hosts[one]} cannot connect to {hosts[other]}"
    elif len(pairs) == 2 and pairs[1] == (other, one):
        what = f"{hosts[one]} and {hosts[other]} cannot connect to each other"
    else:
        what = f"{len(pairs)} of its connections fail, the first from {hosts[one]} to {hosts[other]}"
    return f"{what}: {ways[one, other].error}; is there a firewall?"


def describe_slow_links(pairs: Sequence[Pair], slower: Sequence[Pair], ways: Mapping[Pair, LinkMeasurement]) -> str:
    """How slow, against the others."""
    its = statistics.median(ways[pair].rate or 0.0 for pair in pairs)
    others = statistics.median(way.rate or 0.0 for pair, way in ways.items() if pair not in slower)
    sends, receives = ({pair[end] for pair in pairs} for end in (0, 1))
    what = "sends " if len(sends) < len(receives) else "receives " if len(receives) < len(sends) else ""
    return f"{what}{format_megabits(its)} Mbit/s, the others {format_megabits(others)}"


def describe_high_latency(pairs: Sequence[Pair], later: Sequence[Pair], ways: Mapping[Pair, LinkMeasurement]) -> str:
    """How late, against the others."""
    its = statistics.median(ways[pair].round_trip or 0.0 for pair in pairs)
    others = statistics.median(way.round_trip or 0.0 for pair, way in ways.items() if pair not in later)
    return f"a round trip takes {1e3 * its:.3g} ms, on the others {1e3 * others:.3g}"


def format_megabits(rate: float) -> str:
    """Bits per second as Mbit/s, in three digits."""
    return f"{rate / 1e6:.3g}" if rate < 1e9 else f"{rate / 1e6:.0f}"


def diagnose_all_reduces(
    measured: NetworkMeasurements, hosts: Sequence[str], explained: Collection[frozenset[int]], busy: Sequence[int]
) -> list[DoctorFinding]:
    """All-reduces that failed, were wrong, or far slower than their link explains."""
    found = []
    for rank, error in measured.all_reduce_errors.items():
        found.append(DoctorFinding(f"host {hosts[rank]}", f"its rank cannot all-reduce: {error}"))
    seconds = {pair: taken for pair, (taken, _) in measured.all_reduces.items()}
    usual = statistics.median_low(seconds.values()) if seconds else 0.0
    for pair, (taken, right) in measured.all_reduces.items():
        where = f"link {hosts[min(pair)]}-{hosts[max(pair)]}"
        if not right:
            found.append(DoctorFinding(where, "the sum of an all-reduce is wrong"))
        elif taken > max(2 * OUTLIER_FACTOR * usual, usual + MIN_EXTRA_REDUCE_TIME) and not (
            frozenset(pair) in explained or set(pair) & set(busy)
        ):
            text = f"an all-reduce takes {1e3 * taken:.3g} ms, over the others {1e3 * usual:.3g}"
            found.append(DoctorFinding(where, text, bad=False))
    return found
