"""The process that horovodrun starts in each slot of an elastic run: it starts the worker that trains, and outlives it.

horovodrun's own elastic mode binds membership to the processes that it starts: one that dies takes its host out of the
run, one that hangs while it starts stops all the others, and every change waits for the slowest. So it starts this
process instead: small, without torch, and as long-lived as its host. Next to the training it takes part in horovodrun's
rounds of assignment, starts a dead worker again, kills a frozen one, and publishes which workers are gone.

What becomes of the worker is a state machine (hvdtrain/elastic/lifecycle.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import time
from collections.abc import Mapping, Sequence

from hvdtrain.elastic.endings import FailureHandler
from hvdtrain.elastic.generation import get_newest_plan
from hvdtrain.elastic.leader import Leader
from hvdtrain.elastic.lifecycle import SlotLifecycle, State
from hvdtrain.elastic.peers import PeerMonitor
from hvdtrain.elastic.records import VERDICT, Heartbeat, Verdict
from hvdtrain.elastic.rounds import AssignmentRounds
from hvdtrain.elastic.slot import Request, Slot
from hvdtrain.elastic.store import KeyValueStore, StoreUnreachable
from hvdtrain.elastic.worker import WorkerProcess, start_worker
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.system.limits import SupervisorLimits
from hvdtrain.system.signals import SAME_STOP_SECONDS, SignalInbox


class Supervisor:
    """One slot's supervisor; `supervise_worker` returns the exit code for horovodrun."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        """Start a worker.

        Args:
            command: starts a worker.
            environ: this process's environment, in which horovodrun describes the slot.
        """
        self.command, self.environ = command, dict(environ)
        self.limits = SupervisorLimits.from_environment(environ)
        self.slot = Slot.from_environment(environ)
        self.store = KeyValueStore(self.slot.address, self.slot.port)
        self.name = f"{self.slot.host}:{self.slot.local_rank}:{secrets.token_hex(3)}"
        self.peer_monitor = PeerMonitor(self.store, self.name, self.limits.lease)
        self.rounds = AssignmentRounds(self.store, self.slot, self.handle_removal)
        self.leader = Leader(self.store, self.limits)
        self.failure_handler = FailureHandler(self.store, self.name, self.slot)
        self.workers_started = self.beats = 0
        self.verdict: Verdict | None = None  # how the run has ended
        self.store_lost_since: float | None = None  # when the key-value server stopped answering
        self.lifecycle = SlotLifecycle(
            self.start_worker, self.store, self.failure_handler, self.peer_monitor, self.rounds, self.limits
        )

    def start_worker(self) -> WorkerProcess:
        """Start a worker, under a name of its own."""
        self.workers_started += 1
        return start_worker(self.command, self.environ, self.slot, f"{self.name}.{self.workers_started}")

    def supervise_worker(self) -> int:
        """Run until this slot leaves the run; return the exit code."""
        signals = SignalInbox((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), on_signal=self.handle_signal)
        contextlib.ExitStack().enter_context(signals)  # never left: signals are handled until this process ends
        last_heartbeat = 0.0
        while True:
            self.wait_for_event(signals)
            try:
                while self.lifecycle.advance():
                    pass
                if self.lifecycle.state is State.LEAVING:
                    return self.leave_run(self.lifecycle.exit_code)
                if time.monotonic() - last_heartbeat >= self.limits.heartbeat_interval:
                    last_heartbeat = time.monotonic()
                    self.exchange_heartbeats()
                    self.store_lost_since = None
            except StoreUnreachable:
                if self.handle_lost_store():
                    return EXIT_REQUEUE

    def wait_for_event(self, signals: SignalInbox) -> None:
        """Wait until a signal comes, the worker ends, or it is time to look at it."""
        waited_for = [signals.fileno(), *([self.lifecycle.worker.pidfd] if self.lifecycle.has_worker else [])]
        select.select(waited_for, [], [], self.limits.poll_interval)
        signals.clear_wakeups()

    def handle_signal(self, number: int) -> None:
        """Note that SIGUSR1 asks to stop the run, and SIGTERM or SIGINT this slot to leave it; pass it on."""
        now, requests = time.monotonic(), self.lifecycle.requests
        if number == signal.SIGUSR1:
            requests.stop = True
        elif self.verdict is not None:
            self.lifecycle.worker.process.kill()
            os._exit(self.verdict.code)
        elif not requests.leave:
            requests.leave, requests.leave_at = True, now
        elif now - requests.leave_at > SAME_STOP_SECONDS:
            requests.second_notice = not self.lifecycle.has_worker
        self.lifecycle.send_to_worker(Request.STOP if number == signal.SIGUSR1 else Request.LEAVE)

    def handle_removal(self) -> None:
        """Note that horovodrun's list is without this slot."""
        self.lifecycle.requests.leave = True
        self.lifecycle.send_to_worker(Request.LEAVE)

    def exchange_heartbeats(self) -> None:
        """Send a heartbeat, read the others', and do what follows from them. Called once a second."""
        self.verdict = self.store.get(VERDICT)
        generation, plan = get_newest_plan(self.store)
        members = plan.member_ids if plan is not None else []
        self.send_heartbeat(self.lifecycle.worker.member in members)
        peers = self.peer_monitor.declare_lost()
        self.lifecycle.kill_stuck_worker()
        if self.verdict is not None:
            self.lifecycle.end_worker(members)
        else:
            if self.lifecycle.requests.stop and not peers.alive - peers.gone:
                self.failure_handler.end_run(EXIT_REQUEUE, "")
            if self.lifecycle.worker.member == Leader.choose(members, peers):
                self.leader.announce_round_if_due()
                self.leader.regroup_for_newcomers(
                    generation, plan, peers, lambda: self.lifecycle.send_to_worker(Request.REGROUP)
                )
        self.rounds.answer_newest()  # also after the end: a round that began before it is one that a slot may leave in

    def send_heartbeat(self, joined: bool) -> None:
        """Send a heartbeat. joined: whether the worker is in the newest generation."""
        self.beats += 1
        self.lifecycle.failed_starts = 0 if joined else self.lifecycle.failed_starts
        heartbeat = Heartbeat(
            beats=self.beats,
            member=self.lifecycle.worker.member,
            host=self.slot.host,
            assigned_size=self.rounds.assigned_size,
            ending=self.verdict is not None or self.lifecycle.state is State.LEAVING,
            drained=self.lifecycle.requests.leave,
            joined=joined,
            failed_starts=self.lifecycle.failed_starts,
        )
        self.store.send_heartbeat(self.name, heartbeat)

    def handle_lost_store(self) -> bool:
        """Wait for horovodrun to answer again; return whether this slot is to leave the run instead.

        When horovodrun has not answered for as long as the lease, it is gone: the worker saves and ends.
        """
        now = time.monotonic()
        self.store_lost_since = self.store_lost_since or now
        if now - self.store_lost_since > self.limits.lease:
            if not self.lifecycle.has_worker or self.lifecycle.worker.process.poll() is not None:
                return True
            self.lifecycle.send_to_worker(Request.STOP)
        if now - self.store_lost_since > self.limits.lease + self.limits.worker_exit:
            self.lifecycle.worker.process.kill()
        time.sleep(self.limits.poll_interval)
        return False

    def leave_run(self, code: int) -> int:
        """Let all supervisors learn that the run has ended, if it has; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            # horovodrun has ended meanwhile: its server answers no more, and it kills processes that wait for that.
            signal.signal(number, lambda *_: os._exit(code))
        with contextlib.suppress(StoreUnreachable):
            self.wait_for_end_propagation()
        if code == 0:  # horovodrun takes a process that ends in a round for one that takes part in it
            self.rounds.wait_for_answer(self.limits.worker_exit)
        return code

    def wait_for_end_propagation(self) -> None:
        """Wait until all supervisors know the verdict: horovodrun kills slower ones, and counts that as a failure."""
        deadline = time.monotonic() + self.limits.end_propagation
        while time.monotonic() < deadline:
            self.exchange_heartbeats()
            if self.verdict is None or self.peer_monitor.read().all_know_the_end():
                return
            time.sleep(self.limits.poll_interval)
