"""How this process belongs to the ranks of a run: for good, as launched, or as a member that may come and go.

`Membership` is all that training knows of it; what differs between a static and an elastic run is in its two
implementations.

    FixedMembership    one generation: the ranks that were launched, in the world that Horovod was started in
    ElasticMembership  one generation after another (hvdtrain.elastic.elastic_membership)
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hvdtrain.comm.world import GridShape, World
from hvdtrain.elastic.generation import MemberRequests
from hvdtrain.elastic.served_members import MetServer, Worker
from hvdtrain.recipe.source_copy import RecipeCopy
from hvdtrain.system import messages

if TYPE_CHECKING:  # torch comes with it, and `hvdtrain train` needs a membership before it imports that
    from hvdtrain.comm.agreement import ConsistentPart


@dataclass(frozen=True)
class EnteredWorld:
    """The world of a generation, as this process has entered it."""

    world: World
    is_new: bool  # Horovod was started again for it
    root: int = 0  # the rank whose state all take over
    root_step: int = -1  # the step that this state has reached; -1: no rank has a state


class Membership(Protocol):
    """What a training asks of the way in which its ranks are put together.

    The methods are in the order in which a run calls them; those of a generation come again for each.
    """

    world_may_change: bool

    @property
    def has_joined(self) -> bool:
        """Whether this process was in a generation that others can continue, to whom its failure must be reported."""

    @property
    def change_count(self) -> int:
        """How often the members have changed."""

    # The start of the process.

    def get_recipe_copy(self) -> RecipeCopy | None:
        """Return how the run's copy of its recipe's source is found; None: import the recipe itself."""

    def prepare_process(self, world: World) -> World:
        """Prepare this process, which has entered Horovod's `world`; return the place of the process on its host."""

    def enter_grid(self, world: World, shape: GridShape, device: str | None) -> AbstractContextManager[World]:
        """Let the ranks of each world be a grid within a block, and yield this process's place.

        Args:
            world: the one that this process is in.
            shape: of the grid.
            device: of --device; None: a GPU if there is one.

        Raises:
            UserError: the ranks cannot be divided like that.
        """

    def meet_server(self) -> MetServer | None:
        """With --server, find the server, or become it; None: all ranks are there, and meet as ever.

        Raises:
            MembershipEnded: the run continues without this process, or has ended.
        """

    def publish_workers(self, workers: Sequence[Worker], version: int) -> None:
        """Publish, as the server of an elastic run, its workers when the weights have this version.

        Raises:
            MembershipEnded: this process was declared lost, and another one is the server.
        """

    def watch_gone(self, on_gone: Callable[[Collection[str]], bool]) -> None:
        """Call a function with the names of all members that are gone, once a second until it returns False."""

    def agree_on_launch_name(self, relaunch: str | None) -> str:
        """Return the name by which the processes of this launch know each other. relaunch: of the first launch."""

    def agree_on_run_folder(self, choose: Callable[[], Path]) -> Path:
        """Return the folder of the run, before it begins; the same on all ranks. choose: returns it on one of them."""

    def check_agreement(self, make_parts: Callable[[], Sequence[ConsistentPart]], world: World) -> None:
        """Compare this process with those that began the run. Raises UserError, naming a difference."""

    # Each generation.

    def enter_next_world(self, world: World, step: int) -> EnteredWorld:
        """Enter the world of the next generation.

        Args:
            world: the one that this process is in.
            step: the step that its state has reached; -1 if it has no state.

        Raises:
            MembershipEnded: the run continues without this process, or has ended.
            PeersLost: another rank of the new world has not come; call it again.
        """

    def announce_rank(self, world: World) -> None:
        """Report to the launcher which rank this process has become."""

    def get_run_folder(self) -> Path | None:
        """Return the folder of the run that this process has joined; None if there is none yet."""

    def publish_run_folder(self, folder: Path) -> None:
        """Let all who join find the run folder."""

    def publish_recipe_copy(self, make_description: Callable[[], RecipeCopy]) -> None:
        """Let all who join import the run's copy of the recipe's source."""

    def publish_start(self, step: int) -> None:
        """Publish, on rank 0, after how many steps this generation begins: what is before it is safe."""

    # Each step.

    def request_stop(self) -> None:
        """Ask for the run to stop. A signal handler calls it."""

    def request_leave(self) -> None:
        """Ask for this rank to leave the run, or for a stop if it cannot leave alone. A signal handler calls it."""

    @property
    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop the run."""

    def poll_requests(self) -> MemberRequests:
        """Return what this rank was asked to do so far. Costs microseconds."""

    def is_below_minimum(self, members: int) -> bool:
        """Whether so many members are too few to continue."""

    def leave_if_requested(self) -> None:
        """Leave at the end of a generation, if this member was asked to. Raises MembershipEnded then."""

    # The end of a generation, or of the run.

    def recover_from(self, error: Exception, step: int) -> None:
        """Return if the run continues, after this error after step `step`, with another generation; else raise it."""

    def publish_end(self, code: int, error: str = "") -> None:
        """Publish that the run has ended, with an exit code."""

    def has_run_ended(self) -> bool:
        """Whether the run is known to have ended; also if nobody is left who could know."""

    def find_end_error(self) -> str | None:
        """Return the error with which the run has ended; None if it has not, or nobody is left who could know."""


class FixedMembership:
    """The ranks are those that were launched: one generation, in which each failure ends the run."""

    world_may_change = False
    has_joined = False
    change_count = 0

    def __init__(self) -> None:
        self.stop_requested = False

    def get_recipe_copy(self) -> RecipeCopy | None:
        return None

    def prepare_process(self, world: World) -> World:
        messages.send_message(messages.RankStarted(world.rank, world.host, os.getpid()))
        return world

    def enter_grid(self, world: World, shape: GridShape, device: str | None) -> AbstractContextManager[World]:
        from hvdtrain.comm.grid import enter_grid

        return enter_grid(world, shape, device)

    def meet_server(self) -> MetServer | None:
        return None

    def publish_workers(self, workers: Sequence[Worker], version: int) -> None:
        pass

    def watch_gone(self, on_gone: Callable[[Collection[str]], bool]) -> None:
        pass

    def agree_on_launch_name(self, relaunch: str | None) -> str:
        return secrets.token_hex(8)  # only this process uses it

    def agree_on_run_folder(self, choose: Callable[[], Path]) -> Path:
        from hvdtrain.comm import collectives

        return Path(collectives.on_root("run_folder.chosen", lambda: str(choose())))

    def check_agreement(self, make_parts: Callable[[], Sequence[ConsistentPart]], world: World) -> None:
        """Do nothing: the ranks compared themselves with each other when they started."""

    def enter_next_world(self, world: World, step: int) -> EnteredWorld:
        return EnteredWorld(world, is_new=False)

    def announce_rank(self, world: World) -> None:
        """Do nothing: the rank was announced when the process started."""

    def get_run_folder(self) -> Path | None:
        return None

    def publish_run_folder(self, folder: Path) -> None:
        pass

    def publish_recipe_copy(self, make_description: Callable[[], RecipeCopy]) -> None:
        pass

    def publish_start(self, step: int) -> None:
        pass

    def request_stop(self) -> None:
        self.stop_requested = True

    def request_leave(self) -> None:
        self.request_stop()

    def poll_requests(self) -> MemberRequests:
        return MemberRequests(stop=self.stop_requested)

    def is_below_minimum(self, members: int) -> bool:
        return False

    def leave_if_requested(self) -> None:
        pass

    def recover_from(self, error: Exception, step: int) -> None:
        raise error

    def publish_end(self, code: int, error: str = "") -> None:
        pass

    def has_run_ended(self) -> bool:
        return False

    def find_end_error(self) -> str | None:
        return None
