"""Which worker gets an item when, and of which gradients a version of the weights is made.

              assign                       accept
    queue -----------> out: a worker has it -------> arrived -----------> a version is made of it
      ^                |                                     take_ready
      +----------------+
        give back: backup:K has made its version without it; the worker is late until it has answered
                   or the worker is lost (remove_worker)

In rounds (sync, backup:K) a version is made when as many items have arrived as a global batch has, or as are left of
the epoch; otherwise of each item when it arrives. If workers are lost, so that there are fewer than items, they get
several in a round. With bounded:S an item that has arrived is held back as long as one
that is out could become older than S versions a worker; its worker gets nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hvdtrain.server.items import EpochItems, Item
from hvdtrain.server.roles import Roles


@dataclass(frozen=True)
class Assignment:
    """An item that a worker has."""

    worker: int  # its rank
    item: Item
    read: int  # the version of the weights that it computes with


class Dispatcher:
    """Deals the items of one epoch after the other to workers.

    Attributes:
        version: of the weights, the number of versions that were made.
        handed_out: items that were ever handed out.
        wasted: of these, items whose gradient came too late, or was lost with a worker.
        staleness_sum, staleness_max: of the items that were applied, in versions.
        applied: how many items were applied.
    """

    def __init__(self, roles: Roles, workers: Iterable[int], per_version: int, version: int) -> None:
        """Begin with all workers idle.

        Args:
            roles: whose policy and number of workers bound the age of items.
            workers: the ranks of those who are there.
            per_version: how many items a version is made of.
            version: of the weights.
        """
        self.policy, self.per_version, self.version = roles.policy, per_version, version
        self.workers = list(workers)
        self.handed_out = self.wasted = self.staleness_sum = self.staleness_max = self.applied = 0
        self._bound = roles.policy.find_bound(len(roles.workers)) if not roles.policy.in_rounds else None
        self._out: dict[int, Assignment] = {}  # by worker
        self._late: set[int] = set()
        self._arrived: list[Assignment] = []
        self.items: EpochItems | None = None

    def remove_worker(self, worker: int) -> None:
        """Let others have what a worker has not answered, who is lost."""
        assert self.items is not None
        self.workers.remove(worker)
        self._late.discard(worker)
        if worker in self._out:
            self.items.give_back([self._out.pop(worker).item])
            self.wasted += 1

    def begin_epoch(self, items: EpochItems) -> None:
        """Deal these items; none of an earlier epoch is out."""
        assert not self._out and not self._arrived
        self.items = items

    @property
    def busy(self) -> list[int]:
        """The workers that have not answered yet."""
        return sorted([*self._out, *self._late])

    def assign(self) -> list[Assignment]:
        """Return the items that idle workers get now, at the present version."""
        assert self.items is not None
        have_arrived = {assignment.worker for assignment in self._arrived}
        occupied = {*self._out, *self._late}
        idle = [worker for worker in self.workers if worker not in occupied and worker not in have_arrived]
        if self.policy.in_rounds and len(self.workers) < self.per_version:
            idle += [worker for worker in self.workers if worker in have_arrived and worker not in occupied]
        made: list[Assignment] = []
        for worker in idle:
            if self.items.is_queue_empty or not self._may_assign():
                break
            self._out[worker] = Assignment(worker, self.items.take(), self.version)
            made.append(self._out[worker])
        self.handed_out += len(made)
        return made

    def _may_assign(self) -> bool:
        if not self.policy.in_rounds:
            return True
        spare = self.policy.number if self.policy.kind == "backup" else 0
        return len(self._out) + len(self._arrived) < self.per_version + spare

    def _find_applicable(self) -> int | None:
        """Return the place of the first arrived item whose version leaves all others young enough; None: of none.

        The others can be applied from the oldest to the youngest, one version each: earliest deadline first.
        """
        for place, assignment in enumerate(self._arrived):
            others = [one.read for one in (*self._arrived, *self._out.values()) if one is not assignment]
            ages = [self.version + 1 + number - read for number, read in enumerate(sorted(others))]
            if self._bound is None or all(age <= self._bound for age in ages):
                return place
        return None

    def accept(self, worker: int) -> Assignment | None:
        """Note that a worker has answered; return what it had, None if its gradient comes too late."""
        if worker in self._late:
            self._late.remove(worker)
            return None
        assignment = self._out.pop(worker)
        self._arrived.append(assignment)
        return assignment

    def take_ready(self) -> list[Assignment]:
        """Return what the next version is made of, in the order of the items, and count it; [] if that is not known."""
        assert self.items is not None
        if not self.policy.in_rounds:
            place = self._find_applicable()
            if place is None:
                return []
            ready = [self._arrived.pop(place)]
        elif self._arrived and len(self._arrived) >= min(self.per_version, self.items.left):
            ready, self._arrived = sorted(self._arrived, key=lambda one: one.item), []
            self._give_back_late()
        else:
            return []
        ages = [self.version - one.read for one in ready]
        self.staleness_sum, self.staleness_max = self.staleness_sum + sum(ages), max(self.staleness_max, *ages)
        self.applied += len(ready)
        self.items.apply([one.item for one in ready])
        self.version += 1
        return ready

    def _give_back_late(self) -> None:
        assert self.items is not None
        self.items.give_back([assignment.item for assignment in self._out.values()])
        self.wasted += len(self._out)
        self._late |= set(self._out)
        self._out = {}
