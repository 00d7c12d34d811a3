"""One rank's part in a run: one generation of ranks after the other, until the run ends.

    form_generation: enter a world, take over the state of the rank that is farthest, begin or resume or continue
                     (in a round of local steps each rank keeps its own weights: hvdtrain.training.open_round)
        ^       |
        |       v
        |   run_loop: step after step -----------------> Ending.FINISHED, STOPPED: the summary (fit.py)
        |       |
        |       | a rank is lost (PeersLost), or the recipe has failed and is tried again,
        |       | or all agree after a step: Ending.MEMBERS_LEAVE, MEMBERS_JOIN
        |       | (SHARES_CHANGE: run_loop again, with another plan in the same world)
        +-------+----------------------------------------> MembershipEnded: this rank leaves, or was evicted

With fixed membership there is one generation, and each error ends the run. In an elastic run, this is the way from the
reason for a new generation to the new generation:

    a notice, a change of hosts                                        a signal to this process
          | horovodrun, or the host's agent                                 |
          v                                                                 v
    the supervisor sends its worker a request (hvdtrain.elastic.slot)  request_leave, request_stop
          |                                                                 |
          +--> StopRequest.collect_votes <----------------------------------+
                    | StepVotes travel with the step's scores: all ranks know their sums
                    v
               decide (loop.py): the same ending on all ranks
                    | enter_next_world
                    v
               the members agree on a plan (hvdtrain.elastic.generation) and meet in its world
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvdtrain.comm import collectives
from hvdtrain.comm.grid import find_gradient_group
from hvdtrain.comm.world import World
from hvdtrain.diagnosis.diagnosis import Diagnosis
from hvdtrain.diagnosis.report import WorldHistory
from hvdtrain.elastic.generation import EVICTED_TEXT, MembershipEnded
from hvdtrain.elastic.membership import EnteredWorld
from hvdtrain.ledger.writer import Ledger
from hvdtrain.recipe.given_order import GivenOrder, decode_orders, encode_orders
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.order import is_even
from hvdtrain.system.errors import EXIT_FAILED, RunError, UserError
from hvdtrain.training import hang
from hvdtrain.training.balance import make_speed_comparison
from hvdtrain.training.config import TABLES
from hvdtrain.training.dealing import deal_again
from hvdtrain.training.folder import take_over_folder
from hvdtrain.training.lease import FolderLost
from hvdtrain.training.loop import Ending, run_loop
from hvdtrain.training.open_round import RoundReport, find_farthest
from hvdtrain.training.orders import EpochOrders
from hvdtrain.training.position import Position
from hvdtrain.training.progress import Progress
from hvdtrain.training.run import Generation, Run
from hvdtrain.training.serving import serve_versions
from hvdtrain.training.setup import name_git_commit, open_ledger, plan_generation, write_run_files
from hvdtrain.training.start import (
    begin_run,
    find_run_folder,
    list_compared_tags,
    load_first_weights,
    report_generation,
)


@dataclass(frozen=True)
class ReceivedState:
    """What all ranks of a new world have received."""

    progress: Progress  # of the rank that is farthest
    state: bytes  # its `Step.local_state`
    orders: Mapping[int, GivenOrder]  # of its sampler
    rounds: Sequence[RoundReport]  # of each rank; []: there are no rounds


class Session:
    """This rank's part in a run.

    Attributes:
        run: what stays the same.
        config: what config.json is to hold.
        world: the one that this rank is in.
        position: where this rank's state belongs; None: it has no state that can be continued from.
        resumed_from: the step of the checkpoint that this rank began with, if there was one.
        git_commit: of the repository that the recipe is in, as the run has begun here.
    """

    def __init__(self, run: Run, world: World, config: Mapping[str, object]) -> None:
        """Join a run; `world` is the one that Horovod was started in."""
        self.run, self.config, self.world = run, config, world
        self.position: Position | None = None
        self.resumed_from: int | None = None
        self.git_commit: str | None = None
        self._ledger: Ledger | None = None
        self._diagnosis: Diagnosis | None = None
        self._earlier_worlds: Sequence[WorldHistory] = []
        self._formation_text = ""
        self._lost_state: str | None = None  # that no rank has any more, until a checkpoint is loaded
        self._files = contextlib.ExitStack()  # that are open during a generation

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def run_generations(self) -> tuple[Generation, Position, Ending]:
        """Train in one generation after the other; return the last one, where the run has ended, and how.

        Raises:
            MembershipEnded: the run continues without this rank, or has ended.
            UserError, RunError: the run cannot continue.
        """
        while True:
            try:
                generation, position = self.form_generation()
                make_steps = serve_versions if self.run.service is not None else None
                while (ending := run_loop(generation, position, make_steps)) is Ending.SHARES_CHANGE:
                    generation = deal_again(generation, position)
                if ending in (Ending.FINISHED, Ending.STOPPED):
                    return generation, position, ending
                self.run.membership.leave_if_requested()
            except MembershipEnded:
                # The next rank 0 needs the lease, if there is one.
                self.run.lease.keep_for_launch = not self.run.membership.has_run_ended()
                raise
            except FolderLost as lost:
                self.run.report.close_without_flush()
                if lost.same_launch:
                    raise MembershipEnded(EVICTED_TEXT, EXIT_FAILED) from lost
                raise
            except (UserError, RunError):
                raise
            except Exception as error:
                self.recover_from(error)

    def recover_from(self, error: Exception) -> None:
        """Prepare for the next generation after a lost rank or an error of the recipe. Raises it if there is none."""
        self.run.membership.recover_from(error, self.position.step if self.position is not None else 0)
        if self.run.step.update_in_progress:
            self.position = None
        self.run.report.close()

    # How a generation is formed.

    def form_generation(self) -> tuple[Generation, Position]:
        """Be ready for the first step of the next generation; return it, and where it begins."""
        self.enter_next_world()
        run, begins, weights = self.run, self.position is None, list[str]()
        if self.position is None:
            folder, position = begin_run(run)
            if self._lost_state is not None and not position.step:
                raise RunError(
                    f"{self._lost_state}, and there is no checkpoint yet: save more often by --checkpoint-every"
                )
            weights = load_first_weights(run, position)
            self.resumed_from, self._ledger = position.step or None, None
            run.round.start_run()
        else:
            folder, position = take_over_folder(find_run_folder(run), run.lease), self.position
            position.shares = ""  # those were of other ranks
        before = Now.before_training(run.recipe.now.folder, self.world.rank, self.world.size)
        set_now(run.recipe, before.before_plan(position.step, position.epoch, position.samples))
        orders = EpochOrders(run.step, type(run.recipe).__name__, run.options.data.seed, folder, position, self._ledger)
        plan = plan_generation(run, self.world, position, orders)
        ledger = self._files.enter_context(open_ledger(self._ledger, run.options, plan, position, folder))
        if self.world.rank == 0:
            run.membership.publish_start(position.step)
        notes = [*weights, *write_run_files(run, folder, self.config)] if begins else []
        if begins:
            self.git_commit = name_git_commit(run)
        diagnosis = None
        if run.options.reports.diagnose:
            log_every = run.options.reports.log_every
            diagnosis = Diagnosis(self.world, folder, log_every, run.report.gpu, position.step, self._earlier_worlds)
            diagnosis.comparison.places = run.options.pipeline.name_places()
        self.position, self._ledger, self._diagnosis = position, ledger, diagnosis
        hosts = list(dict.fromkeys(collectives.gather_json(self.world.host, "hosts")))
        generation = Generation(
            run=run,
            world=self.world,
            plan=plan,
            orders=orders,
            folder=folder,
            ledger=ledger,
            diagnosis=diagnosis,
            hosts=hosts,
            formation_text=self._formation_text,
            speeds=make_speed_comparison(run.options, self.world.data_size),
        )
        if not is_even(plan.shares):
            generation = deal_again(generation, position)
        generation.set_now(position, training=True)
        run.report.open_files(folder, plan.total_steps, position, active=self.world.rank == 0)
        if self._lost_state is not None:
            where = f"continuing from step {position.step}'s checkpoint"
            run.report.print_lines([f"state     {self._lost_state}: {where}"])
            self._lost_state = None
        if begins:
            options = {table: self.config[table] for table in TABLES if table in self.config}
            run.report.write_options(options, list_compared_tags(run.recipe))
        report_generation(generation, position, notes)
        return generation, position

    def enter_next_world(self) -> None:
        """Leave the present world for the next generation's; all take over the state of the rank that is farthest."""
        if self._diagnosis is not None:
            self._earlier_worlds, self._diagnosis = self._diagnosis.build_history(), None
        self._files.close()
        membership = self.run.membership
        while True:
            began, reached = time.perf_counter(), -1
            if self.position is not None:
                reached = self.position.step + self.run.held.steps_ahead
            try:
                entered = membership.enter_next_world(self.world, reached)
                reached = self.run.held.settle(reached, entered.root_step)
                if entered.is_new:
                    self.run.step.switch_world(entered.world)
                met = time.perf_counter()
                columns = gather_columns(entered.world, reached)
                if (lost := find_lost_place(columns, entered.root_step)) is not None:
                    self._lost_state = lost
                elif entered.root_step >= 0:
                    self.take_over(self.exchange_state(entered, columns))
                    self._lost_state = None
                if entered.is_new:
                    self._lost_state = self.run.step.exchange_parts(reached, entered.root_step) or self._lost_state
                break
            except collectives.PeersLost:
                continue
        self.world, self.run.held.steps_ahead = entered.world, 0
        if entered.root_step >= 0:
            seconds = time.perf_counter() - met
            self._formation_text = f"ranks met in {met - began:.3f} s, state in {seconds:.3f} s"
        if self._lost_state is not None:
            self.position = None
        hang.configure_hang_reporter(self.world.rank, self.world.size, self.run.options.faults.hang_limit)
        membership.announce_rank(self.world)

    def exchange_state(self, entered: EnteredWorld, columns: Sequence[Sequence[int]]) -> ReceivedState:
        """Return what the rank that is farthest has, on all ranks; in a grid, the state of one of the same column.

        columns: of `gather_columns`.
        """
        progress, state, orders = None, None, None
        rounds, root = list[RoundReport](), entered.root
        if self.run.options.rounds.local_steps is not None:
            rounds = self.run.round.gather_reports(self.position)
            root = find_farthest(rounds)  # of those at the same step, one that has finished the round
        if entered.world.rank == root:
            assert self.position is not None and self._ledger is not None
            rows, ledger = self.run.report.rows.recent, self._ledger.to_state()
            own = Progress(self.position, rows, ledger, self._earlier_worlds, self.git_commit, self.run.round.to_json())
            progress = own.to_json()
        received = collectives.broadcast_json(progress, "regroup.position", root)
        group = find_gradient_group(entered.world)
        root_of_state = columns[entered.world.place].index(entered.root_step) if columns else root
        if collectives.rank(group) == root_of_state:
            state = self.run.step.local_state()
        state = collectives.broadcast_bytes(state, "regroup.state", root_of_state, group)
        if self.run.step.has_sampler:
            if entered.world.rank == root:
                assert self._ledger is not None
                orders = encode_orders(self._ledger.orders)
            orders = collectives.broadcast_bytes(orders, "regroup.orders", root)
        collectives.barrier("regroup.end")
        given = decode_orders(orders) if orders is not None else {}
        return ReceivedState(Progress.from_json(received), state, given, rounds)

    def take_over(self, received: ReceivedState) -> None:
        """Continue from what the rank that is farthest has sent; it may be this one."""
        run, progress, rounds = self.run, received.progress, received.rounds
        if rounds and run.round.follow(progress.round, rounds[collectives.rank()]):
            run.step.rejoin_round(received.state)
        else:
            run.step.load_state(received.state)
        self.position, self._ledger = progress.position, Ledger.from_state(progress.ledger, received.orders)
        run.held.steps_ahead = 0  # what comes after this may fail, too
        if lost := run.round.find_lost(rounds, self.position):
            self._ledger.record_lost(self.position.step, lost)
        self.run.report.rows.recent = list(progress.recent_rows)
        self._earlier_worlds, self.git_commit = progress.earlier_worlds, progress.git_commit


def gather_columns(world: World, reached: int) -> list[list[int]]:
    """Return of each column of a grid the steps that its ranks' states have reached, on all ranks; [] of no grid.

    reached: by this rank's.
    """
    if not world.is_grid:
        return []
    steps = collectives.gather_json(reached, "regroup.reached")
    return [steps[place :: world.replica_ranks] for place in range(world.replica_ranks)]


def find_lost_place(columns: Sequence[Sequence[int]], step: int) -> str | None:
    """Return a clause about the part of the model that no rank of a grid has any more; or None.

    Args:
        columns: of `gather_columns`.
        step: that the rank which is farthest has reached; -1: no rank has a state.
    """
    lost = next((place for place, column in enumerate(columns) if step not in column), None)
    return None if lost is None or step < 0 else f"rank {lost} of every replica was lost, with its part of the model"
