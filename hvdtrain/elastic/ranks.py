"""Which ranks the members of a generation have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.comm.horovod_places import HorovodPlace, place_ranks
from hvdtrain.elastic.records import GenerationPlan, PlannedMember


@dataclass(frozen=True)
class RankAssignment:
    """A member's place in a generation."""

    generation: int
    size: int
    member: PlannedMember
    root: int  # the rank whose state all take over
    step: int  # that this state has reached; -1: nobody has one
    server: tuple[str, int]  # address and port of the rendezvous server

    @staticmethod
    def from_plan(generation: int, plan: GenerationPlan, member: str) -> RankAssignment:
        """Return the place that a plan gives to one of its members."""
        place = plan.members[plan.member_ids.index(member)]
        return RankAssignment(generation, len(plan.members), place, plan.root, plan.step, plan.server)

    def horovod_environment(self) -> dict[str, str]:
        """Return the variables that Horovod reads when it starts."""
        address, port = self.server
        own = self.member
        place = HorovodPlace(own.rank, self.size, own.local_rank, own.local_size, own.cross_rank, own.cross_size)
        meeting = {"GLOO_RENDEZVOUS_ADDR": address, "GLOO_RENDEZVOUS_PORT": port, "HOSTNAME": own.host}
        return place.to_environment() | {f"HOROVOD_{name}": str(value) for name, value in meeting.items()}


def assign_ranks(line: Sequence[str], hosts: Mapping[str, str]) -> list[PlannedMember]:
    """Return the members by rank: those of a host follow each other, hosts and members in the order of `line`.

    Args:
        line: the members, by their names.
        hosts: the host of each of them.
    """
    by_host: dict[str, list[str]] = {}
    for member in line:
        by_host.setdefault(hosts[member], []).append(member)
    ordered = [member for own in by_host.values() for member in own]
    places = place_ranks([hosts[member] for member in ordered])
    return [
        PlannedMember(member, hosts[member], at.rank, at.local_rank, at.local_size, at.cross_rank, at.cross_size)
        for member, at in zip(ordered, places, strict=True)
    ]


def format_assignments(members: Sequence[PlannedMember]) -> dict[str, str]:
    """Return what a rendezvous server answers to Horovod's question for a slot's ranks, by `HOST:LOCAL_RANK`."""
    answers = {}
    for own in members:
        sizes = (own.rank, len(members), own.local_rank, own.local_size, own.cross_rank, own.cross_size)
        answers[f"{own.host}:{own.local_rank}"] = ",".join(map(str, sizes))
    return answers
