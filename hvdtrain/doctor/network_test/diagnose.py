"""Find the bad host or link in what was measured: the one that is far from the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence

from hvdtrain.diagnosis.links import OUTLIER_FACTOR
from hvdtrain.doctor.findings import DoctorFinding, sort_by_severity
from hvdtrain.doctor.network_test.measure import (
    LinkMeasurement,
    NetworkMeasurements,
    busy_ranks,
    high_latency_links,
    slow_links,
)
from hvdtrain.doctor.network_test.messages import Pair

MIN_EXTRA_REDUCE_TIME = 0.05  # seconds that an outlier's all-reduce takes longer, too

Links = Mapping[Pair, LinkMeasurement]  # by direction


def diagnose_network(measured: NetworkMeasurements, hosts: Sequence[str]) -> list[DoctorFinding]:
    """Return what is wrong with hosts and links, the worst first.

    Args:
        measured: by the network test.
        hosts: the names of the ranks' hosts.
    """
    links = measured.links
    failed = [pair for pair, link in links.items() if link.error]
    found = build_link_findings(failed, links, hosts, lambda pairs: describe_failed_links(pairs, links, hosts))
    busy = busy_ranks(measured.cpu_slowdowns)
    for rank in busy:
        others = statistics.median(value for other, value in measured.cpu_slowdowns.items() if other not in busy)
        text = f"it is busy: CPU slowdown {measured.cpu_slowdowns[rank]:.1f}, on the others {others:.1f}"
        found.append(DoctorFinding(f"host {hosts[rank]}", text))
    # A busy host explains its slow links.
    rest = {pair: link for pair, link in links.items() if not set(pair) & set(busy) and not link.error}
    slow = slow_links(rest)
    found += build_link_findings(slow, rest, hosts, lambda pairs: describe_slow_links(pairs, slow, rest))
    late = [pair for pair in high_latency_links(rest) if pair not in slow and pair[::-1] not in slow]
    found += build_link_findings(late, rest, hosts, lambda pairs: describe_high_latency(pairs, late, rest))
    explained = {frozenset(pair) for pair in [*failed, *slow, *late]}
    found += diagnose_all_reduces(measured, hosts, explained, busy)
    return sort_by_severity(found)


def build_link_findings(
    bad: Sequence[Pair], links: Links, hosts: Sequence[str], describe: Callable[[Sequence[Pair]], str]
) -> list[DoctorFinding]:
    """Return bad directions as findings: of a host if all its links are bad, else of each link.

    Args:
        bad: directions, of one kind of fault.
        links: all directions.
        hosts: the names of the ranks' hosts.
        describe: returns the text of a finding for some of the bad directions.
    """
    left, found = list(bad), []
    for rank, host in enumerate(hosts):
        for its in ([pair for pair in links if pair[0] == rank], [pair for pair in links if pair[1] == rank]):
            # A single link does not show which of its ends is bad; and a host is not bad if the other ends explain it.
            if len(its) > 1 and all(pair in bad for pair in its) and any(pair in left for pair in its):
                mine = [pair for pair in bad if rank in pair]
                if not any(is_explained_by_other_end(pair, bad, links, rank) for pair in mine):
                    found.append(DoctorFinding(f"host {host}", describe(mine)))
                    left = [pair for pair in left if rank not in pair]
    for pair in list(left):
        if pair in left:
            both = [direction for direction in (pair, pair[::-1]) if direction in left]
            found.append(DoctorFinding(format_link(pair, hosts), describe(both)))
            left = [direction for direction in left if direction not in both]
    return found


def format_link(pair: Pair, hosts: Sequence[str]) -> str:
    """Return "link h1-h3"."""
    return f"link {hosts[min(pair)]}-{hosts[max(pair)]}"


def is_explained_by_other_end(pair: Pair, bad: Sequence[Pair], links: Links, rank: int) -> bool:
    """Return whether a larger part of the other end's links is bad than of this rank's."""
    other = pair[0] if pair[1] == rank else pair[1]
    return bad_link_fraction(other, bad, links) > bad_link_fraction(rank, bad, links)


def bad_link_fraction(rank: int, bad: Sequence[Pair], links: Links) -> float:
    """Return the fraction of a rank's links that is bad."""
    its = [pair for pair in links if rank in pair]
    return sum(pair in bad for pair in its) / len(its)


def describe_failed_links(pairs: Sequence[Pair], links: Links, hosts: Sequence[str]) -> str:
    """Return which connections fail, and the error of the first."""
    one, other = pairs[0]
    if len(pairs) == 1:
        text = f"{hosts[one]} cannot connect to {hosts[other]}"
    elif len(pairs) == 2 and pairs[1] == (other, one):
        text = f"{hosts[one]} and {hosts[other]} cannot connect to each other"
    else:
        text = f"{len(pairs)} of its connections fail, the first from {hosts[one]} to {hosts[other]}"
    return f"{text}: {links[one, other].error}; is there a firewall?"


def describe_slow_links(pairs: Sequence[Pair], slow: Sequence[Pair], links: Links) -> str:
    """Return the rate of slow directions and that of the others."""
    its = statistics.median(links[pair].rate or 0.0 for pair in pairs)
    others = statistics.median(link.rate or 0.0 for pair, link in links.items() if pair not in slow)
    senders, receivers = ({pair[end] for pair in pairs} for end in (0, 1))
    verb = "sends " if len(senders) < len(receivers) else "receives " if len(receivers) < len(senders) else ""
    return f"{verb}{format_megabits(its)} Mbit/s, the others {format_megabits(others)}"


def describe_high_latency(pairs: Sequence[Pair], late: Sequence[Pair], links: Links) -> str:
    """Return the round trip of late directions and that of the others."""
    its = statistics.median(links[pair].round_trip or 0.0 for pair in pairs)
    others = statistics.median(link.round_trip or 0.0 for pair, link in links.items() if pair not in late)
    return f"a round trip takes {1e3 * its:.3g} ms, on the others {1e3 * others:.3g}"


def format_megabits(rate: float) -> str:
    """Return bits per second as Mbit/s with three digits."""
    return f"{rate / 1e6:.3g}" if rate < 1e9 else f"{rate / 1e6:.0f}"


def diagnose_all_reduces(
    measured: NetworkMeasurements, hosts: Sequence[str], explained: Collection[frozenset[int]], busy: Sequence[int]
) -> list[DoctorFinding]:
    """Return all-reduces that failed, were wrong, or far slower than their link explains.

    Args:
        measured: by the network test.
        hosts: the names of the ranks' hosts.
        explained: pairs whose link has a finding.
        busy: ranks of busy hosts.
    """
    found = []
    for rank, error in measured.all_reduce_errors.items():
        found.append(DoctorFinding(f"host {hosts[rank]}", f"its rank cannot all-reduce: {error}"))
    usual = statistics.median_low([one.seconds for one in measured.all_reduces.values()] or [0.0])
    longest = max(2 * OUTLIER_FACTOR * usual, usual + MIN_EXTRA_REDUCE_TIME)
    for pair, one in measured.all_reduces.items():
        if not one.right:
            found.append(DoctorFinding(format_link(pair, hosts), "the sum of an all-reduce is wrong"))
        elif one.seconds > longest and not (frozenset(pair) in explained or set(pair) & set(busy)):
            text = f"an all-reduce takes {1e3 * one.seconds:.3g} ms, on the others {1e3 * usual:.3g}"
            found.append(DoctorFinding(format_link(pair, hosts), text, bad=False))
    return found
