"""Which ranks the members of a generation have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.comm.horovod_places import place_ranks
from hvdtrain.elastic.records import Candidate, GenerationPlan, PlannedMember


@dataclass(frozen=True)
class RankAssignment:
    """A member's place in a generation."""

    generation: int
    size: int
    member: PlannedMember
    root: int  # the rank whose state all take over
    step: int  # that this state has reached; -1: nobody has one
    servers: Sequence[tuple[str, int]]  # address and port of each column's rendezvous server
    column_hosts: Sequence[str]  # of the members of this one's column

    @staticmethod
    def from_plan(generation: int, plan: GenerationPlan, member: str) -> RankAssignment:
        """Return the place that a plan gives to one of its members."""
        own = plan.members[plan.member_ids.index(member)]
        column = plan.members[own.rank % plan.replica_ranks :: plan.replica_ranks]
        hosts = [other.host for other in column]
        return RankAssignment(generation, len(plan.members), own, plan.root, plan.step, plan.servers, hosts)

    def horovod_environment(self) -> dict[str, str]:
        """Return the variables that Horovod reads when it starts: in a grid, of the column."""
        replica, place = divmod(self.member.rank, len(self.servers))
        address, port = self.servers[place]
        meeting = {"GLOO_RENDEZVOUS_ADDR": address, "GLOO_RENDEZVOUS_PORT": port, "HOSTNAME": self.member.host}
        own = place_ranks(self.column_hosts)[replica].to_environment()
        return own | {f"HOROVOD_{name}": str(value) for name, value in meeting.items()}


def list_whole_replicas(line: Sequence[str], candidates: Mapping[str, Candidate], replica_ranks: int) -> list[str]:
    """Return the members of those replicas whose members are all there, replica by replica, each by its places.

    A replica is on one host: its members have neighbouring slots there.

    Args:
        line: members; replicas stay in the order of their first ones.
        candidates: what is known of each.
        replica_ranks: members of a replica.
    """
    if replica_ranks == 1:
        return list(line)
    replicas: dict[tuple[str, int], dict[int, str]] = {}
    for member in line:
        about = candidates[member]
        number, place = divmod(about.slot, replica_ranks)
        replicas.setdefault((about.host, number), {})[place] = member
    whole = [members for members in replicas.values() if len(members) == replica_ranks]
    return [members[place] for members in whole for place in range(replica_ranks)]


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
        PlannedMember(member, hosts[member], at.rank, at.local_rank, at.local_size)
        for member, at in zip(ordered, places, strict=True)
    ]


def format_assignments(hosts: Sequence[str]) -> dict[str, str]:
    """Return what a rendezvous server answers to Horovod's question for a slot's ranks, by `HOST:LOCAL_RANK`.

    hosts: of the ranks of its world, in their order.
    """
    return {
        f"{host}:{at.local_rank}": ",".join(map(str, vars(at).values()))
        for host, at in zip(hosts, place_ranks(hosts), strict=True)
    }
