"""Where ranks are among those of their host, and across hosts, as Horovod wants to know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HorovodPlace:
    """A rank's place in a world of Horovod; in this order, its answer to who asks for a slot's ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int  # among the ranks with the same local rank, one of each host that has one
    cross_size: int

    def to_environment(self) -> dict[str, str]:
        """Return the variables that Horovod reads when it starts."""
        return {f"HOROVOD_{name.upper()}": str(value) for name, value in vars(self).items()}


def place_ranks(hosts: Sequence[str]) -> list[HorovodPlace]:
    """Return the places of ranks in their order. hosts: of each rank; those of a host follow each other."""
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    places = []
    for rank, host in enumerate(hosts):
        local_rank = by_host[host].index(rank)
        across = [other for other, ranks in by_host.items() if len(ranks) > local_rank]
        cross_rank = across.index(host)
        places.append(HorovodPlace(rank, len(hosts), local_rank, len(by_host[host]), cross_rank, len(across)))
    return places
