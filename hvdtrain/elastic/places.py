"""Which rank each member of a generation has, on its host and among all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def places(line: Sequence[str], present: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The members with their ranks: those of a host follow each other, hosts and members in the order of the line."""
    hosts: dict[str, list[str]] = {}
    for member in line:
        hosts.setdefault(present[member]["host"], []).append(member)
    members: list[dict[str, Any]] = []
    for number, (host, own) in enumerate(hosts.items()):
        for local_rank, member in enumerate(own):
            with_as_many = [i for i, others in enumerate(hosts.values()) if len(others) > local_rank]
            members.append(
                {
                    "id": member,
                    "host": host,
                    "rank": len(members),
                    "local_rank": local_rank,
                    "local_size": len(own),
                    "cross_rank": with_as_many.index(number),
                    "cross_size": len(with_as_many),
                }
            )
    return members
