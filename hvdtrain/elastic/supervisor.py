"""The process that horovodrun starts in each slot of an elastic run. It starts the worker that trains, and stands by.

horovodrun's own elastic mode binds membership to the life of the processes it starts: one that dies takes its host
with it, one that hangs while it starts halts all the others, and a change means that everyone waits for the slowest.
So what it starts here is this: small, without torch, and living as long as its host. It takes part in horovodrun's
rounds of assignment (which start processes on new hosts and tell who is to go) beside the training, starts a dead
worker again, ends a frozen one, and writes on the board who is gone.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import select
import signal
import threading
import time
from collections.abc import Mapping, Sequence

from hvdtrain.elastic.endings import FailureHandler
from hvdtrain.elastic.generation import get_newest_plan
from hvdtrain.elastic.heartbeats import HeartbeatMonitor
from hvdtrain.elastic.records import CANDIDATE, GONE, VERDICT, Heartbeat, Verdict
from hvdtrain.elastic.slot import Request, Slot
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable
from hvdtrain.elastic.tries import describe_exit_code
from hvdtrain.elastic.worker import WorkerProcess, start_worker
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.system.signals import SAME_STOP_SECONDS

SUPERVISOR_INTERVAL = 0.25  # seconds
HEARTBEAT_INTERVAL = 1.0  # seconds between signs of life, and between looks at the others'
ROUND_INTERVAL = 2.0  # seconds between horovodrun's rounds of assignment
HEARTBEAT_LEASE = 10.0  # seconds without a sign of life, after which a supervisor, or a stopped worker, counts as lost
JOIN_GRACE = 3.0  # seconds that a newcomer which is ready waits for others which are starting
END_PROPAGATION_TIMEOUT = 5.0  # seconds for all supervisors to hear that the run has ended
WORKER_EXIT_TIMEOUT = 30.0  # seconds for a worker to end once the run is over


class Supervisor:
    """One slot's supervisor; `run` returns the exit code for horovodrun."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self.command, self.environ = command, dict(environ)
        self.slot = Slot.from_environment(environ)
        self.store = KeyValueStore(self.slot.address, self.slot.port)
        self.name = f"{self.slot.host}:{self.slot.local_rank}:{secrets.token_hex(3)}"
        self.failure_handler = FailureHandler(self.store, self.name, self.slot)
        self.lease = float(environ.get("HVDTRAIN_LEASE", HEARTBEAT_LEASE))
        self.heartbeat_monitor = HeartbeatMonitor()
        self.assigned_size = self.slot.size  # of horovodrun's list of slots, when it was last asked
        self.workers_started = self.beats = self.failed_starts = 0
        self.drain_requested = False  # told to go, by horovodrun or by a signal
        self.drain_requested_at = 0.0  # when, by the monotonic clock
        self.stop_requested = False  # told to stop the run
        self.removed_by_horovodrun = False  # by horovodrun
        self.answered_round = 0
        self.round_began_at = time.monotonic()
        self.answer_thread: threading.Thread | None = None  # waits for horovodrun's answer in this round
        self.newcomer_since: float | None = None
        self.regrouped_generation = 0  # the last that our worker was told to leave for a larger one
        self.store_lost_since: float | None = None  # when the board stopped answering
        self.verdict: Verdict | None = None  # how the run has ended
        self.ending_since: float | None = None
        self.restart_at: float | None = None  # when a new worker is to be started; there is none until then
        self.second_notice = False  # to go, when there was no worker any more
        self.absent_since: float | None = None  # answers no round any more, so that horovodrun goes on without it
        self.is_leaving = False  # and needs to hear no more
        self.worker = self.start_next_worker()

    def start_next_worker(self) -> WorkerProcess:
        self.workers_started += 1
        return start_worker(self.command, self.environ, self.slot, f"{self.name}.{self.workers_started}")

    def supervise_worker(self) -> int:
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle_signal)
        pulsed = 0.0
        while True:
            select.select(
                [woken] if self.restart_at is not None else [self.worker.pidfd, woken], [], [], SUPERVISOR_INTERVAL
            )
            with contextlib.suppress(BlockingIOError):
                if select.select([woken], [], [], 0)[0]:
                    os.read(woken, 4096)
            ended = self.worker.process.poll()
            try:
                if ended is not None and (code := self.handle_worker_exit(ended)) is not None:
                    return self.leave_run(code)
                if self.restart_at is not None and time.monotonic() >= self.restart_at and not self.stop_requested:
                    self.restart_at, self.worker = None, self.start_next_worker()
                if time.monotonic() - pulsed >= HEARTBEAT_INTERVAL:
                    pulsed = time.monotonic()
                    self.exchange_heartbeats()
                self.store_lost_since = None
            except StoreUnreachable:
                if (code := self.handle_lost_store(ended)) is not None:
                    return code

    def handle_signal(self, number: int, frame: object) -> None:
        """SIGUSR1 stops the run (launch sends it); SIGTERM and SIGINT mean this slot alone: its node goes away."""
        now = time.monotonic()
        if number == signal.SIGUSR1:
            self.stop_requested = True
        elif self.verdict is not None:
            self.worker.process.kill()
            os._exit(self.verdict.code)
        elif not self.drain_requested:
            self.drain_requested, self.drain_requested_at = True, now
        elif now - self.drain_requested_at > SAME_STOP_SECONDS:
            self.second_notice = self.restart_at is not None
        self.send_to_worker(Request.STOP if number == signal.SIGUSR1 else Request.LEAVE)

    def send_to_worker(self, request: Request) -> None:
        if self.restart_at is None:
            self.worker.send(request)

    def exchange_heartbeats(self) -> None:
        """Once a second: give a sign of life, look for the others', and see to rounds and newcomers."""
        self.beats += 1
        self.verdict = self.store.get(VERDICT)
        knows = self.verdict is not None or self.is_leaving
        generation, plan = get_newest_plan(self.store)
        members = plan.member_ids if plan is not None else []
        joined = self.worker.member in members
        self.failed_starts = 0 if joined else self.failed_starts
        beat = Heartbeat(
            beats=self.beats,
            member=self.worker.member,
            host=self.slot.host,
            assigned_size=self.assigned_size,
            ending=knows,
            drained=self.drain_requested,
            joined=joined,
            failed_starts=self.failed_starts,
        )
        self.store.send_heartbeat(self.name, beat)
        pulses, gone = self.store.get_heartbeats(), set(self.store.get_all(GONE))
        lost = self.heartbeat_monitor.find_expired(pulses, self.lease)
        for member in {pulses[name].member for name in lost if name != self.name} - gone:
            self.store.put_if_absent(GONE.of(member), "lost")
            gone.add(member)
        self.kill_stuck_worker()
        if self.verdict is not None:
            self.ending_since = self.ending_since or time.monotonic()
            if self.worker.member not in members or time.monotonic() - self.ending_since > WORKER_EXIT_TIMEOUT:
                self.worker.process.kill()  # it was about to join
            self.answer_round()  # in a round that began before the end, and that a slot may leave in
            return
        alive = {pulse.member for name, pulse in pulses.items() if name not in lost}
        if self.stop_requested and not alive - gone:
            self.failure_handler.end_run(EXIT_REQUEUE, "")
        working = (alive - gone) or alive
        leader = next((member for member in members if member in working), min(working))
        if self.worker.member == leader:
            # Also while it waits for an answer itself: that may be for a slot which has answered all there was to.
            if time.monotonic() - self.round_began_at >= ROUND_INTERVAL:
                self.round_began_at = time.monotonic()
                self.store.announce_round(self.store.get_newest_round() + 1)
            self.regroup_for_newcomers(generation, members, alive, gone)
        self.answer_round()

    def answer_round(self) -> None:
        """Answer horovodrun's newest round, in a thread: it may wait for a slot that never comes."""
        if self.absent_since is None and not self.removed_by_horovodrun and (newest := self.find_unanswered_round()):
            self.answered_round = newest
            self.answer_thread = threading.Thread(target=self.fetch_assignment, daemon=True)
            self.answer_thread.start()

    def find_unanswered_round(self) -> int:
        """The newest round, where this slot has not answered it and waits in no other one either; else 0."""
        if self.answer_thread is not None and self.answer_thread.is_alive():
            return 0
        newest = self.store.get_newest_round()
        return newest if newest > self.answered_round else 0

    def fetch_assignment(self) -> None:
        with contextlib.suppress(StoreUnreachable):
            rank, size = self.store.wait_for_assignment(self.slot.host, self.slot.local_rank)
            self.answered_round = (
                self.store.get_newest_round()
            )  # all slots answered at once, whatever the round that each was in
            if rank >= 0:
                self.assigned_size = size
            else:
                self.removed_by_horovodrun = self.drain_requested = True
                self.send_to_worker(Request.LEAVE)

    def regroup_for_newcomers(self, generation: int, members: list[str], alive: set[str], gone: set[str]) -> None:
        """Tell our worker, and so all, to form a larger generation when newcomers are ready."""
        ready = {m for m in self.store.get_all(CANDIDATE.of(generation + 1)) if m not in gone and m not in members}
        if not members or not ready or self.regrouped_generation == generation:
            self.newcomer_since = None
            return
        starting = {member for member in alive if member not in members and member not in gone} - ready
        self.newcomer_since = self.newcomer_since or time.monotonic()
        if not starting or time.monotonic() - self.newcomer_since > JOIN_GRACE:
            self.regrouped_generation = generation
            self.send_to_worker(Request.REGROUP)

    def kill_stuck_worker(self) -> None:
        """End a worker that somebody has stopped, or that is blocked: the others wait for it."""
        if self.restart_at is not None:
            return
        if self.worker.is_blocked():
            # It may be within a call to the system that no signal ends: the others need not wait for that.
            self.store.put_if_absent(GONE.of(self.worker.member), "blocked")
            self.worker.process.kill()
        if self.worker.is_stopped(self.lease):
            self.worker.process.kill()

    def handle_worker_exit(self, code: int) -> int | None:
        """The worker has ended: the exit code to leave with, or None where another one is to be started."""
        going = self.drain_requested or code == EXIT_REQUEUE
        called = going and bool(self.find_unanswered_round())  # asked before the verdict: see may_leave
        if self.restart_at is None:
            self.store.put_if_absent(GONE.of(self.worker.member), "left" if going else describe_exit_code(code))
        verdict = self.store.get(VERDICT)
        if verdict is not None:
            return verdict.code
        if going:
            self.drain_requested = True
            self.restart_at = math.inf
            # Never 0: horovodrun would take that for the end of the run, where it counts on this slot, or does again.
            return EXIT_REQUEUE if self.removed_by_horovodrun or self.second_notice or self.may_leave(called) else None
        if self.restart_at is not None:
            return None
        return self.handle_worker_death(code)

    def handle_worker_death(self, code: int) -> int | None:
        """The worker has died: the exit code to leave with, or None if another one is to be started, after a pause."""
        worker = self.worker
        if self.stop_requested:  # `pulse` ends the run when nobody trains any more
            worker.close()
            self.restart_at = math.inf
            return None
        after = self.failure_handler.decide_after_death(
            worker.member, code, worker.record, self.failed_starts, self.get_live_peers()
        )
        self.failed_starts = after.failed_starts
        if after.exit_code is not None:
            return after.exit_code
        # Not given up while others train: horovodrun would take the whole host away, and a single host is the job.
        worker.close()
        self.restart_at = time.monotonic() + after.restart_delay
        return None

    def may_leave(self, called: bool) -> bool:
        """Whether horovodrun will notice before the run ends that this slot is gone: else it counts that as a failure.

        It notices in a round. So this slot leaves when a new one has begun, `called`, while the run goes on: the others
        all answer that one before they end.
        """
        if self.host_has_other_workers():
            self.absent_since = None
            return False
        self.absent_since = self.absent_since or time.monotonic()
        return called or time.monotonic() - self.absent_since > WORKER_EXIT_TIMEOUT

    def host_has_other_workers(self) -> bool:
        """Whether another slot of this host has a worker, or will: horovodrun ends it if this supervisor leaves."""
        gone = self.store.get_all(GONE)
        return any(
            pulse.host == self.slot.host and not (pulse.drained and pulse.member in gone)
            for pulse in self.get_live_peers()
        )

    def get_live_peers(self) -> list[Heartbeat]:
        """The pulses of the other supervisors that are alive."""
        pulses = self.store.get_heartbeats()
        lost = self.heartbeat_monitor.find_expired(pulses, self.lease)
        return [pulse for name, pulse in pulses.items() if name != self.name and name not in lost]

    def handle_lost_store(self, ended: int | None) -> int | None:
        """horovodrun does not answer; if it is gone, the worker saves and ends, while it can."""
        now = time.monotonic()
        self.store_lost_since = self.store_lost_since or now
        if now - self.store_lost_since > self.lease:
            if ended is not None:
                return EXIT_REQUEUE
            self.send_to_worker(Request.STOP)
        if now - self.store_lost_since > self.lease + WORKER_EXIT_TIMEOUT:
            self.worker.process.kill()
        time.sleep(SUPERVISOR_INTERVAL)
        return None

    def wait_for_end_propagation(self) -> None:
        """Where the run has ended: horovodrun ends those that are slower to hear of it, and calls that a failure."""
        deadline = time.monotonic() + END_PROPAGATION_TIMEOUT
        while time.monotonic() < deadline:
            self.exchange_heartbeats()
            pulses = self.store.get_heartbeats()
            lost = self.heartbeat_monitor.find_expired(pulses, self.lease)
            if self.verdict is None or all(pulse.ending or name in lost for name, pulse in pulses.items()):
                return
            time.sleep(SUPERVISOR_INTERVAL)

    def leave_run(self, code: int) -> int:
        """Leave. With 0 when horovodrun's round is over: it takes one that ends in a round for one that is there."""
        for number in (signal.SIGTERM, signal.SIGINT):
            # horovodrun has ended meanwhile; its server answers no more, and it kills those that wait for that.
            signal.signal(number, lambda *_: os._exit(code))
        self.is_leaving = True
        with contextlib.suppress(StoreUnreachable):
            self.wait_for_end_propagation()
        if self.answer_thread is not None and code == 0:
            self.answer_thread.join(WORKER_EXIT_TIMEOUT)
        return code
