"""Who takes part in an elastic run with a parameter server, by the plans that its server writes.

    a plan whose server is not gone ------- connect with the address in it ----------------> a worker
    no plan, or one whose server is gone -- put plan-N, of oneself alone: the first counts --> the server

Nobody follows these plans, or waits for others: a worker that is lost breaks its connection, one that joins makes one.
The server writes a new plan when a worker has joined, so that supervisors know whose death is one of the run's.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvdtrain.elastic.generation import (
    EVICTED_TEXT,
    GenerationFormer,
    MemberRequests,
    MembershipEnded,
    get_newest_plan,
    get_own_address,
)
from hvdtrain.elastic.ranks import assign_ranks
from hvdtrain.elastic.records import BEGAN, GONE, PLAN, GenerationPlan
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable
from hvdtrain.system.errors import EXIT_FAILED
from hvdtrain.system.signed_http import read_key

if TYPE_CHECKING:  # torch comes with it, and `hvdtrain train` needs a membership before it imports that
    from hvdtrain.comm.socket_messages import MessageListener

WATCH_SECONDS = 1.0
Worker = tuple[str, str]  # a member, and its host


@dataclass(frozen=True)
class MetServer:
    """What a member of an elastic run with a parameter server has found.

    Attributes:
        member: this process's name.
        host: its host, as horovodrun calls it.
        slots: of the run, as this member was started.
        least: members without whom nothing is done.
        connection: with the server; None: this member is it.
        listener: of this member, if it is the server.
        server: the server's name.
    """

    member: str
    host: str
    slots: int
    least: int
    connection: Any
    listener: MessageListener | None
    server: str


def meet_server(former: GenerationFormer, poll_requests: Callable[[], MemberRequests]) -> MetServer:
    """Connect with the server of the run, or become it, if there is none.

    Raises:
        MembershipEnded: the run has ended, or this member was asked to leave or to stop, or was declared lost.
    """
    from hvdtrain.comm.socket_messages import MessageListener, connect_peer

    store, slot, listener = former.store, former.slot, None
    address = get_own_address(slot.interface, slot.address)
    about = former.member, slot.host, slot.size, slot.min_members
    while True:
        former.is_asked_to_end(poll_requests)
        (number, plan), gone = get_newest_plan(store), store.get_all(GONE)
        former.check_not_gone(gone)
        if plan is not None and plan.member_ids[0] not in gone:
            try:
                connection = connect_peer(plan.servers[0], read_key(), 0)
            except OSError:  # it has died, and its supervisor does not know yet
                time.sleep(10 * former.limits.poll)
                continue
            if listener is not None:
                listener.close()
            return MetServer(*about, connection, None, plan.member_ids[0])
        listener = listener or MessageListener(address, read_key())
        if put_plan(former, number + 1, [], listener):
            return MetServer(*about, None, listener, former.member)


def put_plan(former: GenerationFormer, number: int, workers: Sequence[Worker], listener: MessageListener) -> bool:
    """Put a plan of this member, as the server, and workers; return whether it is the one that counts."""
    hosts = {former.member: former.slot.host, **dict(workers)}
    where = (str(listener.server_address[0]), int(listener.server_address[1]))
    plan = GenerationPlan(assign_ranks(list(hosts), hosts), [where], 0, -1, None)
    if former.store.put_if_absent(PLAN.of(number), plan) != plan:
        return False
    former.generation, former.has_joined = number, True
    return True


def publish_workers(
    former: GenerationFormer, workers: Sequence[Worker], listener: MessageListener, version: int
) -> None:
    """Publish, as the server, who takes part from a version of the weights on.

    Raises:
        MembershipEnded: this server was declared lost, and another one has taken its place.
    """
    if not put_plan(former, former.generation + 1, workers, listener):
        raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED)
    former.store.put(BEGAN.of(former.generation), version)


def watch_gone(store: KeyValueStore, on_gone: Callable[[Collection[str]], bool]) -> None:
    """Call a function with the names of all members that are gone, in a thread, once a second until it returns False.

    A worker or server that has died has broken its connections itself; one whose host is gone has not.
    """

    def watch() -> None:
        is_watching = True
        while is_watching:
            time.sleep(WATCH_SECONDS)
            with contextlib.suppress(StoreUnreachable):
                is_watching = on_gone(store.get_all(GONE).keys())

    threading.Thread(target=watch, daemon=True).start()
