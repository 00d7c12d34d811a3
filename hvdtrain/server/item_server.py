"""The dispatcher: rank 0 hands out items and weights, and takes gradients as they come."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np

from hvdtrain.comm.messages import Messages
from hvdtrain.recipe.framework import StepResult, StepVotes
from hvdtrain.server.dispatcher import Assignment, Dispatcher
from hvdtrain.server.items import Bytes, EpochItems, Item, ItemContext
from hvdtrain.server.roles import Roles, decode_failure, encode_failure
from hvdtrain.server.served_step import ServedStep
from hvdtrain.server.shards import OtherServers
from hvdtrain.server.worker import ItemResult
from hvdtrain.system import activity
from hvdtrain.system.errors import KnownError, RunError


@dataclass(frozen=True)
class Contribution:
    """What a worker has contributed to a version."""

    assignment: Assignment
    result: ItemResult
    gradients: Bytes  # on rank 0's parameters

    @property
    def examples(self) -> int:
        """How many examples the item has."""
        return self.assignment.item.end - self.assignment.item.begin


class Crew(Protocol):
    """The workers of an elastic run.

    Attributes:
        least: workers without whom no item is handed out.
    """

    least: int

    def add_worker(self, worker: int, member: str, host: str, version: int) -> None:
        """Publish that a worker has come, when the weights had this version."""

    def remove_worker(self, worker: int, version: int) -> None:
        """Report that one is lost."""


class ItemServer:
    """Rank 0's side of a run with a parameter server.

    Attributes:
        roles: of the ranks.
        hosts: of the ranks, each once.
        waited: seconds that the last version was waited for.
    """

    def __init__(
        self,
        roles: Roles,
        hosts: list[str],
        messages: Messages,
        step: ServedStep,
        crew: Crew | None = None,
    ) -> None:
        """Begin. crew: the workers of an elastic run, who come and go; None: all are there from the start on."""
        self.roles, self.hosts, self.step, self._messages = roles, hosts, step, messages
        self._crew = crew
        self._context: ItemContext | None = None
        self.waited = 0.0
        self.others = OtherServers(roles, messages, step)
        self._own = self.others.parts[0]
        self._dispatcher: Dispatcher | None = None
        self._weights, self._weights_version = step.make_array(self._own), -1
        self._free: list[Bytes] = []  # arrays for gradients
        self._contributions: dict[Item, Contribution] = {}  # that are not in a version yet
        self._read: dict[int, Bytes] = {}  # by worker, with +dc: the weights that it computes with
        self._epoch = 0

    @property
    def has_begun(self) -> bool:
        """Whether the workers know what all items have in common."""
        return self._dispatcher is not None

    @property
    def dispatcher(self) -> Dispatcher:
        """Who has which item."""
        assert self._dispatcher is not None
        return self._dispatcher

    def begin_run(self, context: ItemContext, per_version: int, version: int) -> None:
        """Tell the workers what all items have in common. version: of the weights."""
        self._context = context
        self.others.send_weights()
        workers = self.roles.workers if self._crew is None else []
        self._dispatcher = Dispatcher(self.roles, workers, per_version, version)
        for worker in workers:
            self._messages.send(worker, ["begin", asdict(context), worker])

    def begin_epoch(self, epoch: int, items: EpochItems) -> None:
        """Deal the items of an epoch (from 0)."""
        self._epoch = epoch
        self.dispatcher.begin_epoch(items)

    def collect_version(self) -> list[Contribution]:
        """Hand out items, and return the gradients that the next version of the weights is made of."""
        self.waited = 0.0
        while True:
            if ready := self.dispatcher.take_ready():
                return [self._contributions.pop(assignment.item) for assignment in ready]
            if self._crew is None or len(self.dispatcher.workers) >= self._crew.least:
                for assignment in self.dispatcher.assign():
                    self._send_item(assignment)
            if self.dispatcher.busy:
                activity.enter_activity("waiting for a gradient", waits=True)
                self._receive_answer()
            else:
                with activity.temporary_activity("waiting for enough workers", waits=True, endless=True):
                    self._receive_answer()
            activity.enter_activity("updating the model")

    def sum_gradients(self, contributions: list[Contribution], votes: StepVotes) -> StepResult:
        """Let the weighted sum of gradients be those of a step, on all servers; return what it has come to.

        votes: of all workers.
        """
        factors = [one.examples / sum(other.examples for other in contributions) for one in contributions]
        sums = np.sum([one.result.sums for one in contributions], axis=0)
        is_finite = all(one.result.is_finite for one in contributions)
        weighted = [[one.assignment.worker, factor] for one, factor in zip(contributions, factors, strict=True)]
        self.others.tell("sum", weighted, sums.tolist(), is_finite, votes.examples)
        self.step.start_step([], 1.0, False)
        for one, factor in zip(contributions, factors, strict=True):
            self.step.add_gradients(one.gradients, factor, self._own)
        self.step.add_scores(sums, is_finite)
        self.step.cast_votes(votes)
        result = self.step.all_reduce()
        nonfinite = (*result.nonfinite_gradients, *self.others.collect_nonfinite())
        return replace(result, nonfinite_gradients=nonfinite, waited_here=self.waited)

    def release(self, contributions: list[Contribution]) -> None:
        """Use the arrays of contributions again, which are applied."""
        self._free += [contribution.gradients for contribution in contributions]

    def _send_item(self, assignment: Assignment) -> None:
        if self._weights_version != self.dispatcher.version:
            self.step.read_weights(self._weights, self._own)
            self._weights_version = self.dispatcher.version
        if self.roles.policy.compensation is not None:
            self._read[assignment.worker] = self._weights.copy()
        self._messages.send(assignment.worker, ["item", self._epoch, *assignment.item], self._weights)
        self.others.tell("weights", assignment.worker)

    def _receive_answer(self) -> None:
        began, gradients = time.perf_counter(), self._free.pop() if self._free else self.step.make_array(self._own)
        worker, (kind, *values) = self._messages.receive(gradients)
        self.waited += time.perf_counter() - began
        if kind in ("joined", "lost"):
            self._free.append(gradients)
            self._change_crew(worker, kind, values)
            return
        assignment = self.dispatcher.accept(worker)
        if kind == "failed":
            raise decode_failure(values[0], values[1], worker)
        if assignment is None:
            self.others.tell("drop", worker)
            self._free.append(gradients)
            return
        strength, is_delayed = self.roles.policy.compensation, self.dispatcher.version > assignment.read
        self.others.tell("take", worker, is_delayed, strength)
        if strength is not None and is_delayed:
            self.step.compensate_delay(gradients, self._read[worker], strength, self._own)
        self._contributions[assignment.item] = Contribution(assignment, ItemResult(**values[0]), gradients)

    def _change_crew(self, worker: int, kind: str, about: Sequence[str]) -> None:
        assert self._crew is not None and self._context is not None
        if kind == "joined":
            self.dispatcher.workers.append(worker)
            self._messages.send(worker, ["begin", asdict(self._context), worker])
            member, host, name = about
            self.hosts += [name] if name not in self.hosts else []
            self._crew.add_worker(worker, member, host, self.dispatcher.version)
        elif worker in self.dispatcher.workers:
            self.dispatcher.remove_worker(worker)
            self._crew.remove_worker(worker, self.dispatcher.version)

    def end_run(self, summary: dict[str, object], error: str | None) -> None:
        """Send the workers how the run has ended, when each has answered."""
        self._drain()
        message = ["end", summary] if error is None else ["failed", RunError.__name__, error, 0]
        self.others.tell(*message)
        for worker in self._present_workers():
            self._messages.send(worker, message)

    def _present_workers(self) -> list[int]:
        if self._crew is None:
            return list(self.roles.workers)
        return self._dispatcher.workers if self._dispatcher is not None else []

    def announce_failure(self, error: KnownError) -> None:
        """Let the workers raise the same error, when each has answered."""
        self._drain()
        message = ["failed", *encode_failure(error), error.origin or 0]
        self.others.tell(*message)
        for worker in (worker for worker in self._present_workers() if worker != error.origin):
            self._messages.send(worker, message)

    def _drain(self) -> None:
        for worker in self._dispatcher.busy if self._dispatcher is not None else ():
            _, (kind, *_) = self._messages.receive(self._weights, worker)
            if kind == "gradient":
                self.others.tell("drop", worker)

    def describe(self) -> dict[str, object]:
        """Return what summary.json has of the server."""
        known = {
            "servers": self.roles.servers,
            "workers": len(self.roles.workers),
            "staleness": self.roles.policy.text,
        }
        dispatcher = self._dispatcher
        if dispatcher is None:
            return known
        return known | {
            "items_applied": dispatcher.applied,
            "items_handed_out": dispatcher.handed_out,
            "items_late": dispatcher.wasted,
            "staleness_mean": dispatcher.staleness_sum / max(1, dispatcher.applied),
            "staleness_max": dispatcher.staleness_max,
        }
