"""The ranks of each host as a group, and those at the same place of their hosts, next to Horovod's world.

host a     rank 0   rank 1         a row: within a host
host b     rank 2   rank 3
|        +------- a column: across hosts, one rank of each
+----------------
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm.signed_store import SignedStore, open_store
from hvdtrain.comm.torch_group import TorchGroup
from hvdtrain.comm.torch_ranks import connect_ranks
from hvdtrain.comm.world import World, connections
from hvdtrain.system.text import format_count


@dataclass(frozen=True, eq=False)
class HostGroups:
    """This rank's row and column.

    Attributes:
        rows: the ranks of each host.
        row: those of this host, in their order.
        column: the ranks of all hosts at this rank's place, in the order of hosts.
        store: by which they have met.
    """

    rows: Sequence[Sequence[int]]
    row: TorchGroup
    column: TorchGroup
    store: SignedStore

    def describe(self) -> str:
        """Return their numbers: `2 hosts x 4 ranks`."""
        return f"{format_count(self.column.size(), 'host')} x {format_count(self.row.size(), 'rank')}"

    def number_parts(self) -> tuple[int, ...]:
        """Return by rank its number if those at the same place of their hosts follow each other."""
        columns = [rank for column in zip(*self.rows, strict=True) for rank in column]
        return tuple(columns.index(rank) for rank in range(len(columns)))

    def close(self) -> None:
        """Leave the groups, unless that is done; collectives of other ranks that wait for this one fail."""
        if self not in connections:
            return
        connections.discard(self)
        self.row.abort()
        self.column.abort()
        self.store.close()


def arrange_rows(hosts: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each host, the hosts in the order of their first ranks. hosts: of each rank."""
    rows: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        rows.setdefault(host, []).append(rank)
    return list(rows.values())


def explain_no_columns(rows: Sequence[Sequence[int]]) -> str | None:
    """Return why there is nothing to be gained by rows, or no column of all hosts; None: there is."""
    if len(rows) == 1:
        return "all ranks are on one host"
    counts = Counter(map(len, rows))
    if len(counts) > 1:
        few, many = min(counts), max(counts)
        return f"hosts have {few} to {many} ranks; expected the same number on each"
    return "each host has one rank" if 1 in counts else None


def connect_hosts(world: World, name: str, device: torch.device) -> HostGroups | str:
    """Connect this rank's row and column, on all ranks; or return why there are none.

    Args:
        world: this process's place.
        name: of the groups: others of the same ranks have other names.
        device: of the tensors.

    Raises:
        PeersLost: a rank does not come.
    """
    rows = arrange_rows(collectives.gather_json(world.host, f"{name}.hosts"))
    if (reason := explain_no_columns(rows)) is not None:
        return reason
    store = open_store()
    row = next(ranks for ranks in rows if world.rank in ranks)
    column = [ranks[row.index(world.rank)] for ranks in rows]
    own_row = connect_ranks(store, f"{name}.row", row, world, device)
    own_column = connect_ranks(store, f"{name}.column", column, world, device)
    assert own_row is not None and own_column is not None
    groups = HostGroups(rows, own_row, own_column, store)
    connections.add(groups)
    return groups
