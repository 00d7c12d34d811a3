"""Find the rank behind a slow link, by what the kernels counted of the ranks' connections. No collectives.

In a ring, a slow link makes all ranks wait alike: by their times it is nobody. But bytes are under way far longer on
the connections of one rank than on the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hvdtrain.diagnosis.straggler import LINK, MIN_COST_SHARE, STOLEN_INDEX, WAIT_INDEX, StepTimes, Straggler
from hvdtrain.system.tcp_info import TcpTraffic

Direction = tuple[int, int]  # from a rank to another one

# A link or host is an outlier if it is this many times worse than the others: a cable that fell back to a lower speed
# is ten times slower.
OUTLIER_FACTOR = 5.0
MIN_TRAFFIC_SHARE = 0.1  # of the busiest direction's bytes: acknowledgements of little are late, and mean nothing
MIN_DELIVERED = 100_000  # bytes in the time that is looked at: of less, late acknowledgements are most of the time
MIN_WAIT_SHARE = 0.5  # of the wait: how long the bytes need on a link that explains it


def upper_quartile(values: Iterable[float]) -> float:
    """Return the upper quartile, 0 without values: of three hosts, one bad host may have half of the links."""
    ordered = sorted(values)
    return ordered[min(len(ordered) * 3 // 4, len(ordered) - 1)] if ordered else 0.0


def find_slow_rates(rates: Mapping[Direction, float]) -> list[Direction]:
    """Return the directions with a far lower rate than others."""
    usual = upper_quartile(rates.values())
    return [pair for pair, rate in rates.items() if rate * OUTLIER_FACTOR < usual]


@dataclass
class DirectionTraffic:
    """What a rank has sent to another one: bytes, seconds in which they were under way, rates that kernels measured."""

    delivered: int = 0
    busy: float = 0.0
    rates: list[float] = field(default_factory=list)

    def estimate_rate(self) -> float:
        """Return bytes/s: by the time that bytes were under way, or by the kernel, of which both may be too low."""
        return max(self.delivered / max(self.busy, 1e-3), float(np.median(self.rates)))


def match_directions(traffic: Sequence[Iterable[TcpTraffic]]) -> dict[Direction, DirectionTraffic]:
    """Return the traffic from rank to rank, of connections of which both ends are among the ranks.

    Args:
        traffic: of each rank, any number of times for each connection.
    """
    owners = {(one.local, one.remote): rank for rank, own in enumerate(traffic) for one in own}
    found: dict[Direction, DirectionTraffic] = defaultdict(DirectionTraffic)
    for rank, own in enumerate(traffic):
        for one in own:
            other = owners.get((one.remote, one.local))
            if other is not None and other != rank:
                direction = found[rank, other]
                direction.delivered += one.delivered
                direction.busy += one.busy
                direction.rates.append(one.rate)
    return found


def find_slow_link(times: StepTimes, traffic: Sequence[Iterable[TcpTraffic]]) -> Straggler | None:
    """Return the rank whose link all ranks wait for, or None.

    Args:
        times: (steps, ranks, TIME_PARTS, or one more) seconds.
        traffic: of each rank, in about the time of these steps.
    """
    seconds = float(np.median(times[:, :, :STOLEN_INDEX].sum(axis=(0, 2))))
    step = float(np.median(times[:, :, :STOLEN_INDEX].sum(axis=2)))
    waits = np.median(times[:, :, WAIT_INDEX], axis=0)
    if len(waits) < 2 or waits.min() < MIN_COST_SHARE * step:
        return None
    counted = match_directions(traffic)
    most = max((one.delivered for one in counted.values()), default=0)
    least = max(MIN_TRAFFIC_SHARE * most, MIN_DELIVERED)
    rates = {pair: one.estimate_rate() for pair, one in counted.items() if one.delivered > least}
    share = MIN_WAIT_SHARE * waits.min() / step  # of the time, at least
    needed = {pair: counted[pair].delivered / max(rate, 1.0) for pair, rate in rates.items()}
    slow = [pair for pair in find_slow_rates(rates) if needed[pair] > share * seconds]
    if not slow:
        return None
    # The rank that most of them have in common; of a single link, the one that sends.
    ends = Counter(rank for pair in slow for rank in pair)
    slowest = min(slow, key=lambda pair: rates[pair])
    rank = max(ends, key=lambda one: (ends[one], one == slowest[0]))
    its = [pair for pair in slow if rank in pair]
    worst = min(its, key=lambda pair: (rank != pair[0], rates[pair]))
    usual = float(np.median([rate for pair, rate in rates.items() if pair not in slow]))
    cost = float(np.median(waits))
    detail = (
        f"its link to rank {worst[0] if worst[1] == rank else worst[1]} carries {8e-6 * rates[worst]:.3g} Mbit/s, "
        f"the others {8e-6 * usual:.3g}"
    )
    return Straggler(rank, cost, cost / step, LINK, needed[worst] / seconds * step, detail)
