"""The slots that horovodrun gives out, and which rank each member of a generation has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MEMBER_VARIABLE = "HVDTRAIN_MEMBER"  # in a worker's environment: its slot and its name
MESSAGE_FD_VARIABLE = "HVDTRAIN_MESSAGES"  # the file descriptor on which its supervisor tells it things


@dataclass(frozen=True)
class Slot:
    """A place for a worker, as horovodrun gives it."""

    host: str
    local_rank: int
    local_size: int
    size: int  # of the world when the slot was filled
    address: str  # of horovodrun's key-value server
    port: int
    interface: str
    least: int  # members of a generation

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> Slot:
        return Slot(
            host=environ["HOROVOD_HOSTNAME"],
            local_rank=int(environ["HOROVOD_LOCAL_RANK"]),
            local_size=int(environ["HOROVOD_LOCAL_SIZE"]),
            size=int(environ["HOROVOD_SIZE"]),
            address=environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"],
            port=int(environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]),
            interface=environ.get("HOROVOD_GLOO_IFACE", "lo"),
            least=int(environ.get("HVDTRAIN_MIN_NP", "1")),
        )

    def to_json(self, member: str) -> str:
        return json.dumps({"member": member, "slot": asdict(self)})


@dataclass(frozen=True)
class RankAssignment:
    """A member's place in a generation."""

    generation: int
    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    host: str
    root: int  # the rank whose state all take over
    step: int  # that it has reached; -1: nobody has a state
    server: tuple[str, int]

    def horovod_environment(self) -> dict[str, str]:
        """What Horovod reads when it starts."""
        names = ("rank", "size", "local_rank", "local_size", "cross_rank", "cross_size")
        values = {f"HOROVOD_{name.upper()}": str(getattr(self, name)) for name in names}
        address, port = self.server
        values |= {"HOROVOD_GLOO_RENDEZVOUS_ADDR": address, "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port)}
        return values | {"HOROVOD_HOSTNAME": self.host}


def assign_ranks(line: Sequence[str], present: Mapping[str, Any]) -> list[dict[str, Any]]:
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
