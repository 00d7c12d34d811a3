"""A worker's membership in an elastic run, through horovodrun's key-value store.

supervisor --- one byte a request through a pipe: leave, stop, regroup --> poll_requests --> votes of the next step
signals ------ request_leave, request_stop -------------------------------------^
votes of all -- a rank leaves, or newcomers are ready --> the loop ends the generation --> enter_next_world:
                GenerationFormer makes a plan with the others, each starts Horovod again in the plan's world
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hvdtrain.comm.world import GridShape, World, enter_world, shut_down_horovod
from hvdtrain.elastic.generation import INCOMPLETE_TEXT, GenerationFormer, MemberRequests, MembershipEnded
from hvdtrain.elastic.membership import EnteredWorld, FixedMembership, Membership
from hvdtrain.elastic.ranks import RankAssignment
from hvdtrain.elastic.records import (
    AGREEMENT,
    BEGAN,
    CHOSEN_FOLDER,
    ERROR,
    FOLDER,
    LAUNCH,
    SOURCE,
    VERDICT,
    TrainingError,
    Verdict,
)
from hvdtrain.elastic.replica import ReplicaMeeting
from hvdtrain.elastic.served_members import MetServer, Worker, meet_server, publish_workers, watch_gone
from hvdtrain.elastic.slot import MEMBER_VARIABLE, Request, Slot, read_requests
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable
from hvdtrain.recipe.source_copy import RecipeCopy
from hvdtrain.system import activity, cpus, messages
from hvdtrain.system.errors import EXIT_RESTART, RecipeError, UserError
from hvdtrain.system.messages import RankStarted
from hvdtrain.system.signed_http import read_key
from hvdtrain.system.text import format_count

if TYPE_CHECKING:  # torch comes with it, and `hvdtrain train` needs a membership before it imports that
    from hvdtrain.comm.agreement import ConsistentPart


class ElasticMembership:
    """This worker's membership in an elastic run."""

    world_may_change = True

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Read what this worker's supervisor has left in the environment."""
        self.slot, self.member, self.requests_fd = Slot.from_worker_environment(environ)
        self.store = KeyValueStore(self.slot.address, self.slot.port)
        os.set_blocking(self.requests_fd, False)
        self.stop_requested = self.leave_requested = self.regroup_requested = False
        self._former = GenerationFormer(self.store, self.slot, self.member)
        self._grid: World | None = None  # this process's place in a grid, before it meets others
        self._device: str | None = None  # of --device
        self._met: MetServer | None = None  # in a run with a parameter server

    @property
    def has_joined(self) -> bool:
        return self._former.has_joined

    @property
    def change_count(self) -> int:
        return self._former.generation - 1

    def get_recipe_copy(self) -> RecipeCopy | None:
        return self.store.get(SOURCE)

    def prepare_process(self, world: World) -> World:
        """Bind this process, which is alone at first, to its slot's cores."""
        cpus.bind_to_cores(self.slot.local_rank, self.slot.local_size)
        return replace(world, local_rank=self.slot.local_rank, local_size=self.slot.local_size, may_change=True)

    @contextlib.contextmanager
    def enter_grid(self, world: World, shape: GridShape, device: str | None) -> Iterator[World]:
        """Yield the place in a replica that this slot has in every grid; the others are met later."""
        ranks, slot = shape.replica_ranks, self.slot
        if slot.local_size % ranks:
            raise UserError(
                f"{shape.flags}: in an elastic run a replica is on one host, and {slot.host} has "
                f"{format_count(slot.local_size, 'slot')}; expected a multiple of {ranks}"
            )
        self._grid = shape.divide_world(replace(world, rank=slot.local_rank % ranks, size=ranks))
        self._device, self._former.replica_ranks = device, ranks
        from hvdtrain.comm.grid import disconnect_grid
        from hvdtrain.comm.torch_group import is_lost_peer

        try:
            with self._meet_replica(self._grid) if shape.built_together else contextlib.nullcontext():
                yield self._grid
        except Exception as error:
            if self._former.replica and not self.has_joined and is_lost_peer(error):
                raise MembershipEnded(INCOMPLETE_TEXT, EXIT_RESTART) from error
            raise
        finally:
            disconnect_grid()

    @contextlib.contextmanager
    def _meet_replica(self, grid: World) -> Iterator[None]:
        """Connect this worker with the others of its replica, which is its world until it enters a generation's."""
        from hvdtrain.comm.grid import connect_grid
        from hvdtrain.comm.signed_store import SignedStore

        with contextlib.closing(ReplicaMeeting(self._former)) as meeting:
            with activity.temporary_activity("waiting for its replica", waits=True, endless=True):
                plan = meeting.meet(self.poll_requests)
            connect_grid(grid, SignedStore(*plan.server, read_key()), self._device)
            yield

    def meet_server(self) -> MetServer:
        with activity.temporary_activity("looking for the server", waits=True, patient=True):
            self._met = meet_server(self._former, self.poll_requests)
        return self._met

    def publish_workers(self, workers: Sequence[Worker], version: int) -> None:
        assert self._met is not None and self._met.listener is not None
        with contextlib.suppress(StoreUnreachable):  # the next worker's plan names all
            publish_workers(self._former, workers, self._met.listener, version)

    def watch_gone(self, on_gone: Callable[[Collection[str]], bool]) -> None:
        watch_gone(self.store, on_gone)

    def agree_on_launch_name(self, relaunch: str | None) -> str:
        return self.store.put_if_absent(LAUNCH, relaunch or secrets.token_hex(8))

    def check_agreement(self, make_parts: Callable[[], Sequence[ConsistentPart]], world: World) -> None:
        """Compare this worker with what the first one recorded."""
        from hvdtrain.comm.agreement import check_against_record, make_agreement_record, parse_agreement_record

        parts = make_parts()
        recorded = self.store.put_if_absent(AGREEMENT, make_agreement_record(parts))
        check_against_record(parts, parse_agreement_record(recorded), world)

    def enter_next_world(self, world: World, step: int) -> EnteredWorld:
        if self._met is not None:  # a server is alone in its world, and meets workers by its listener
            return EnteredWorld(world, is_new=False)
        # Nothing of the old world may be waited for: some of it is gone.
        if self._grid is not None:
            from hvdtrain.comm.grid import disconnect_grid

            disconnect_grid()
            if not self.has_joined:
                gc.freeze()  # what is there stays: to search it for garbage takes 0.2 s, for which others would wait
        shut_down_horovod()
        with activity.temporary_activity("waiting for enough ranks", waits=True, endless=True):
            place = self._former.form_next_generation(step, self.poll_requests)
        self.regroup_requested = False
        activity.enter_activity("meeting the other ranks", patient=True)
        entered = replace(enter_world(place.horovod_environment()), may_change=True)
        if self._grid is not None:
            entered = self._connect_grid(self._grid, place)
        return EnteredWorld(entered, True, place.root, place.step)

    def _connect_grid(self, grid: World, place: RankAssignment) -> World:
        """Connect the grid of a generation, whose columns Horovod has entered; return this process's place in it."""
        from hvdtrain.comm.grid import connect_grid
        from hvdtrain.comm.signed_store import SignedStore

        own = place.member
        os.environ |= {"HOROVOD_RANK": str(own.rank), "HOROVOD_SIZE": str(place.size)}  # for messages
        world = replace(grid, rank=own.rank, size=place.size, local_rank=own.local_rank, local_size=own.local_size)
        connect_grid(world, SignedStore(*place.servers[0], read_key()), self._device)
        return world

    def announce_rank(self, world: World) -> None:
        own, supervisor = os.getpid(), os.getppid()
        size = world.size if self._met is None else self._met.slots
        messages.send_message(RankStarted(world.rank, world.host, own, size, self.slot.host, supervisor))

    def agree_on_run_folder(self, choose: Callable[[], Path]) -> Path:
        known = self.store.get(FOLDER) or self.store.get(CHOSEN_FOLDER)
        return Path(known or self.store.put_if_absent(CHOSEN_FOLDER, str(choose().absolute())))

    def get_run_folder(self) -> Path | None:
        folder = self.store.get(FOLDER)
        return Path(folder) if folder else None

    def publish_run_folder(self, folder: Path) -> None:
        self.store.put(FOLDER, str(folder.absolute()))

    def publish_recipe_copy(self, make_description: Callable[[], RecipeCopy]) -> None:
        self.store.put(SOURCE, make_description())

    def publish_start(self, step: int) -> None:
        self.store.put(BEGAN.of(self._former.generation), step)

    def request_stop(self) -> None:
        self.stop_requested = True

    def request_leave(self) -> None:
        self.leave_requested = True

    def poll_requests(self) -> MemberRequests:
        """Return what this member was asked to do, by signals and by its supervisor's `leave`, `stop`, `regroup`."""
        requests = read_requests(self.requests_fd)
        self.leave_requested |= Request.LEAVE in requests
        self.regroup_requested |= Request.REGROUP in requests
        self.stop_requested |= Request.STOP in requests
        return MemberRequests(self.stop_requested, self.leave_requested, self.regroup_requested)

    def is_below_minimum(self, members: int) -> bool:
        return self._met is None and members < self.slot.min_members  # a server waits for workers

    def leave_if_requested(self) -> None:
        if self.leave_requested:
            self._former.announce_departure()

    def recover_from(self, error: Exception, step: int) -> None:
        """Report an error of the recipe, so that the run ends when it comes again at the same step.

        A lost peer is not one: the next generation is without it. A server ends the run.
        """
        from hvdtrain.comm.collectives import PeersLost
        from hvdtrain.comm.torch_group import is_lost_peer

        if self._met is not None:
            raise error
        if isinstance(error, PeersLost) or (self._grid is not None and is_lost_peer(error)):
            return
        if isinstance(error, RecipeError):
            text, trace = str(error), error.trace
        else:
            text, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
        print(f"{trace}hvdtrain: retrying once after an error after step {step}: {text}", file=sys.stderr)
        self.store.put(ERROR.of(self._former.generation, self.member), TrainingError(step, text))

    def publish_end(self, code: int, error: str = "") -> None:
        self.store.put(VERDICT, Verdict(code, error))

    def has_run_ended(self) -> bool:
        try:
            return self.store.get(VERDICT) is not None
        except StoreUnreachable:
            return True

    def find_end_error(self) -> str | None:
        try:
            verdict = self.store.get(VERDICT)
        except StoreUnreachable:
            return None
        return None if verdict is None else verdict.error


def membership_from_environment() -> Membership:
    """Return this process's membership: elastic if a supervisor has started it."""
    return ElasticMembership(os.environ) if MEMBER_VARIABLE in os.environ else FixedMembership()
