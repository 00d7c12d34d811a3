"""A parameter server in an elastic run: its workers come and go, and one of them takes its place if it is lost.

worker lost     its connection breaks: its item goes back to the queue, the others continue
worker joins    it connects and gets the next item, with the newest weights
server lost     its workers' connections break: the first of them is the server, from the newest checkpoint on
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

from hvdtrain.comm.crew_messages import CrewMessages
from hvdtrain.comm.socket_messages import SocketMessages
from hvdtrain.comm.world import World, connections
from hvdtrain.elastic.membership import Membership
from hvdtrain.elastic.served_members import MetServer, Worker
from hvdtrain.server.item_server import ItemServer
from hvdtrain.server.roles import choose_roles
from hvdtrain.server.served_step import ServedStep
from hvdtrain.system.text import format_count
from hvdtrain.training.options import RunOptions
from hvdtrain.training.reporter import Reporter
from hvdtrain.training.service import Service


class ElasticCrew:
    """Publishes and reports which workers a server has."""

    def __init__(self, met: MetServer, membership: Membership, report: Reporter) -> None:
        self.least = max(1, met.least - 1)
        self._membership, self._report = membership, report
        self._workers: dict[int, Worker] = {}

    @property
    def is_too_small(self) -> bool:
        """Whether no item is handed out, so that no step counts votes."""
        return len(self._workers) < self.least

    def name_members(self) -> dict[int, str]:
        """Return the workers' names, by rank. Any thread may call it."""
        return {rank: member for rank, (member, _) in self._workers.copy().items()}

    def add_worker(self, worker: int, member: str, host: str, version: int) -> None:
        """Publish that a worker has come, when the weights had this version."""
        self._workers[worker] = member, host
        self._membership.publish_workers(list(self._workers.values()), version)
        self._print_line(version, f"rank {worker} on {host} has joined")

    def remove_worker(self, worker: int, version: int) -> None:
        """Report that one is lost; its supervisor publishes it."""
        _, host = self._workers.pop(worker)
        self._print_line(version, f"rank {worker} on {host} has left")

    def _print_line(self, version: int, what: str) -> None:
        ranks = format_count(1 + len(self._workers), "rank")
        self._report.print_lines([f"world     {ranks}, from step {version} on; {what}"])


def join_service(
    step: ServedStep, met: MetServer, options: RunOptions, world: World, membership: Membership, report: Reporter
) -> Service:
    """Return this process's part in the run, as it has met the server or is it. `world` has no other process."""
    roles = choose_roles(options.service, met.slots)
    threads = options.resolve_threads(world.local_size).count
    if met.listener is None:
        messages = SocketMessages(lambda: leave_if_asked(membership))
        messages.add_peer(0, met.connection)
        connections.add(messages)
        membership.watch_gone(partial(drop_gone, messages, lambda: {0: met.server}))
        messages.send(0, ["joined", met.member, met.host, world.host])
        return Service(roles, 1, threads, messages, step, None, None)
    os.environ["HOROVOD_RANK"] = "0"  # for messages, of a process that was a worker
    crew = ElasticCrew(met, membership, report)
    crew_messages = CrewMessages(met.listener, lambda: crew.is_too_small and leave_if_asked(membership, stop=True))
    server = ItemServer(roles, [world.host], crew_messages, step, crew)
    connections.add(crew_messages)
    membership.watch_gone(partial(drop_gone, crew_messages, crew.name_members))
    return Service(roles, 0, threads, crew_messages, step, server, None)


def drop_gone(messages: SocketMessages, name_members: Callable[[], Mapping[int, str]], gone: Collection[str]) -> bool:
    """Break the connections with members that are gone; return whether there may be others. name_members: by rank."""
    for rank, member in name_members().items():
        if member in gone:
            messages.break_connection(rank)
    return not messages.is_closed


def leave_if_asked(membership: Membership, stop: bool = False) -> bool:
    """Leave the run if this process, which has nothing to save, was asked to. stop: also if the run is to stop.

    Raises MembershipEnded then; else returns False.
    """
    requests = membership.poll_requests()
    if stop and requests.stop:
        membership.request_leave()
    membership.leave_if_requested()
    return False


def announce_worker(membership: Membership, world: World, rank: int) -> None:
    """Report to the launcher which rank the server has given this worker."""
    os.environ["HOROVOD_RANK"] = str(rank)  # for messages
    membership.announce_rank(replace(world, rank=rank))
