"""A slot's worker and what becomes of it: the state machine of a supervisor.

    RUNNING --- died ---> RESTARTING --- pause is over ---> RUNNING
       |                   |      |
       |             stop  |      | leave
       |                   v      v
       +-- died -----> STOPPED -> DRAINED <--> ABSENT
       +-- left -----------------^
       +-- the run has ended ---> ENDING           all but RUNNING ---> LEAVING ---> exit

    state        worker   event                                                  next state
    RUNNING      alive    the worker died                                        RESTARTING
                          the worker died after the run was asked to stop        STOPPED
                          the worker left: exit code 75, or asked to leave       DRAINED
                          the worker died and the run makes no progress          LEAVING  (1 or 2)
                          the run has ended                                      ENDING
    RESTARTING   dead     its pause is over                                      RUNNING
                          the run was asked to stop                              STOPPED
                          this slot was asked to leave                           DRAINED
    STOPPED      dead     this slot was asked to leave                           DRAINED
    DRAINED      dead     no other slot of this host has a worker                ABSENT
    ABSENT       dead     another slot of this host has a worker                 DRAINED
                          a new round has begun, or none has for 30 s            LEAVING  (75)
    DRAINED, ABSENT       horovodrun's list is without this slot, or a second
                          notice has come                                        LEAVING  (75)
    all these    dead     the run has ended                                      LEAVING  (the run's exit code)
    ENDING       alive    the worker ended; killed after 30 s                    LEAVING  (the run's exit code)
    LEAVING      dead     all supervisors know that the run has ended, or 5 s    exit

Signals, and horovodrun's answers in another thread, only set `requests`; the state changes in `advance` and
`end_worker`, in the supervisor's main thread. If the key-value store does not answer, it stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from hvdtrain.elastic.endings import FailureHandler
from hvdtrain.elastic.peers import PeerMonitor
from hvdtrain.elastic.records import GONE, VERDICT
from hvdtrain.elastic.rounds import AssignmentRounds
from hvdtrain.elastic.slot import Request
from hvdtrain.elastic.store import KeyValueStore
from hvdtrain.elastic.tries import describe_exit_code
from hvdtrain.elastic.worker import WorkerProcess
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.system.limits import SupervisorLimits


class State(Enum):
    """What a slot is doing; the table above has the transitions."""

    RUNNING = auto()
    RESTARTING = auto()
    STOPPED = auto()
    DRAINED = auto()
    ABSENT = auto()
    ENDING = auto()
    LEAVING = auto()


@dataclass
class SlotRequests:
    """What this slot was asked to do, by signals and by horovodrun."""

    stop: bool = False  # to save and stop the run
    leave: bool = False  # to leave the run: its host goes away
    leave_at: float = 0.0  # when a signal first asked for that, by the monotonic clock
    second_notice: bool = False  # a signal asked for that again, when the worker had left


@dataclass
class SlotLifecycle:
    """The state of one slot. All methods that read or write the store raise StoreUnreachable."""

    start_worker: Callable[[], WorkerProcess]
    store: KeyValueStore
    failure_handler: FailureHandler
    peer_monitor: PeerMonitor
    rounds: AssignmentRounds
    limits: SupervisorLimits
    requests: SlotRequests = field(default_factory=SlotRequests)
    failed_starts: int = 0  # of workers, in a row: they ended before they joined a generation
    restart_at: float = 0.0  # the end of RESTARTING, by the monotonic clock
    exit_code: int = EXIT_REQUEUE  # of LEAVING

    def __post_init__(self) -> None:
        self.start_next_worker()

    def enter(self, state: State) -> None:
        """Change the state."""
        self.state, self.state_since = state, time.monotonic()

    @property
    def has_worker(self) -> bool:
        """Whether the worker was alive when it was last looked at."""
        return self.state in (State.RUNNING, State.ENDING)

    def start_next_worker(self) -> None:
        """Start a worker."""
        self.worker = self.start_worker()
        self.enter(State.RUNNING)

    def send_to_worker(self, request: Request) -> None:
        """Ask the worker for something, if there is one."""
        if self.has_worker:
            self.worker.send(request)

    def advance(self) -> bool:
        """Change the state if there is reason to; return whether it has changed."""
        before = self.state
        match before:
            case State.RUNNING | State.ENDING:
                if (code := self.worker.process.poll()) is not None:
                    self.handle_worker_exit(code)
            case State.RESTARTING | State.STOPPED:
                self.await_restart()
            case State.DRAINED | State.ABSENT:
                self.await_departure()
        return self.state is not before

    def handle_worker_exit(self, code: int) -> None:
        """Publish that the worker is gone, and decide what follows."""
        left = self.requests.leave or code == EXIT_REQUEUE
        self.store.put(GONE.of(self.worker.member), "left" if left else describe_exit_code(code))
        if self.follow_verdict():
            return
        if left:
            self.drain()
        elif self.requests.stop:  # the supervisor ends the run when no other worker is left
            self.worker.close()
            self.enter(State.STOPPED)
        else:
            self.handle_worker_death(code)

    def handle_worker_death(self, code: int) -> None:
        """Start another worker after a pause, or end the run if it makes no progress."""
        worker, peers = self.worker, self.peer_monitor.read()
        response = self.failure_handler.decide_after_death(
            worker.member, code, worker.record, self.failed_starts, peers.others
        )
        self.failed_starts = response.failed_starts
        if response.exit_code is not None:
            self.leave_with(response.exit_code)
            return
        # Not given up while others train: horovodrun would take the whole host away, and a single host is the job.
        worker.close()
        self.restart_at = time.monotonic() + response.restart_delay
        self.enter(State.RESTARTING)

    def await_restart(self) -> None:
        """Start the next worker when its time has come, unless the run or this slot is to end."""
        if self.follow_verdict():
            return
        if self.requests.leave:
            self.drain()
        elif self.state is State.RESTARTING and self.requests.stop:
            self.enter(State.STOPPED)
        elif self.state is State.RESTARTING and time.monotonic() >= self.restart_at:
            self.start_next_worker()

    def drain(self) -> None:
        """Wait, without a worker, until horovodrun will notice that this slot is gone."""
        self.requests.leave = True
        self.enter(State.DRAINED)

    def await_departure(self) -> None:
        """Leave when horovodrun will notice, before the run ends, that this slot is gone: else it counts as a failure.

        horovodrun notices in a round, which all other slots answer before they end. So this slot leaves when a round
        has begun while the run continues. As long as its host has another worker it stays: horovodrun would kill that
        one. The exit code is never 0: horovodrun would take that for the end of the run.
        """
        round_has_begun = self.rounds.find_unanswered() > 0  # asked before the verdict: the run continued then
        if self.follow_verdict():
            return
        if self.rounds.is_removed or self.requests.second_notice:
            self.leave_with(EXIT_REQUEUE)
            return
        stays = self.peer_monitor.read().host_has_other_workers(self.failure_handler.slot.host)
        self.rounds.is_suspended = not stays
        if stays != (self.state is State.DRAINED):
            self.enter(State.DRAINED if stays else State.ABSENT)
        elif not stays and (round_has_begun or time.monotonic() - self.state_since > self.limits.worker_exit):
            self.leave_with(EXIT_REQUEUE)

    def follow_verdict(self) -> bool:
        """Leave with the run's exit code, if the run has ended; return whether it has."""
        verdict = self.store.get(VERDICT)
        if verdict is not None:
            self.leave_with(verdict.code)
        return verdict is not None

    def leave_with(self, code: int) -> None:
        """Leave the run."""
        self.exit_code = code
        self.enter(State.LEAVING)

    def kill_stuck_worker(self) -> None:
        """Kill a worker that is stopped by a signal, or blocked: the others wait for it."""
        if not self.has_worker:
            return
        if self.worker.is_blocked():
            # It may be in a system call that no signal ends: the others need not wait for its death.
            self.store.put(GONE.of(self.worker.member), "blocked")
            self.worker.process.kill()
        if self.worker.is_stopped(self.limits.lease):
            self.worker.process.kill()

    def end_worker(self, members: Sequence[str]) -> None:
        """Give the worker time to end with the run; kill it after that, or at once if it was about to join."""
        if self.state is State.RUNNING:
            self.enter(State.ENDING)
        late = time.monotonic() - self.state_since > self.limits.worker_exit
        if self.state is State.ENDING and (late or self.worker.member not in members):
            self.worker.process.kill()
