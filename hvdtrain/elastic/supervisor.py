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
from typing import Any

from hvdtrain.elastic.endings import Endings
from hvdtrain.elastic.heartbeats import Watch
from hvdtrain.elastic.membership import newest_plan
from hvdtrain.elastic.places import Slot
from hvdtrain.elastic.store import Board, BoardLost
from hvdtrain.elastic.tries import describe_end
from hvdtrain.elastic.worker import Worker, start_worker
from hvdtrain.system.errors import EXIT_REQUEUE
from hvdtrain.system.signals import SAME_STOP

TICK = 0.25  # seconds
PULSE = 1.0  # seconds between signs of life, and between looks at the others'
ROUND = 2.0  # seconds between horovodrun's rounds of assignment
LEASE = 10.0  # seconds without a sign of life, after which a supervisor, or a stopped worker, counts as lost
NEWCOMERS = 3.0  # seconds that a newcomer which is ready waits for others which are starting
ALL_KNOW = 5.0  # seconds for all supervisors to hear that the run has ended
ENDING = 30.0  # seconds for a worker to end once the run is over


class Supervisor:
    """One slot's supervisor; `run` returns the exit code for horovodrun."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self.command, self.environ = command, dict(environ)
        self.slot = Slot.from_environment(environ)
        self.board = Board(self.slot.address, self.slot.port)
        self.name = f"{self.slot.host}:{self.slot.local_rank}:{secrets.token_hex(3)}"
        self.endings = Endings(self.board, self.name, self.slot)
        self.lease = float(environ.get("HVDTRAIN_LEASE", LEASE))
        self.watch = Watch()
        self.size = self.slot.size  # of horovodrun's list of slots, when it was last asked
        self.started = self.beats = self.failed_starts = 0
        self.drained = False  # told to go, by horovodrun or by a signal
        self.drained_at = 0.0  # when, by the monotonic clock
        self.stopping = False  # told to stop the run
        self.removed = False  # by horovodrun
        self.round = 0
        self.round_began = time.monotonic()
        self.answer: threading.Thread | None = None  # waits for horovodrun's answer in this round
        self.newcomer_since: float | None = None
        self.asked_generation = 0  # the last that our worker was told to leave for a larger one
        self.lost_since: float | None = None  # when the board stopped answering
        self.verdict: dict[str, Any] | None = None  # how the run has ended
        self.ending_since: float | None = None
        self.restart_at: float | None = None  # when a new worker is to be started; there is none until then
        self.told_again = False  # to go, when there was no worker any more
        self.absent_since: float | None = None  # answers no round any more, so that horovodrun goes on without it
        self.leaving = False  # and needs to hear no more
        self.worker = self.start()

    def start(self) -> Worker:
        self.started += 1
        return start_worker(self.command, self.environ, self.slot, f"{self.name}.{self.started}")

    def run(self) -> int:
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.on_signal)
        pulsed = 0.0
        while True:
            select.select([woken] if self.restart_at is not None else [self.worker.pidfd, woken], [], [], TICK)
            with contextlib.suppress(BlockingIOError):
                if select.select([woken], [], [], 0)[0]:
                    os.read(woken, 4096)
            ended = self.worker.process.poll()
            try:
                if ended is not None and (code := self.on_end(ended)) is not None:
                    return self.leave(code)
                if self.restart_at is not None and time.monotonic() >= self.restart_at and not self.stopping:
                    self.restart_at, self.worker = None, self.start()
                if time.monotonic() - pulsed >= PULSE:
                    pulsed = time.monotonic()
                    self.pulse()
                self.lost_since = None
            except BoardLost:
                if (code := self.on_lost_board(ended)) is not None:
                    return code

    def on_signal(self, number: int, frame: object) -> None:
        """SIGUSR1 stops the run (launch sends it); SIGTERM and SIGINT mean this slot alone: its node goes away."""
        now = time.monotonic()
        if number == signal.SIGUSR1:
            self.stopping = True
        elif self.verdict is not None:
            self.worker.process.kill()
            os._exit(int(self.verdict["code"]))
        elif not self.drained:
            self.drained, self.drained_at = True, now
        elif now - self.drained_at > SAME_STOP:
            self.told_again = self.restart_at is not None
        self.tell(b"s" if number == signal.SIGUSR1 else b"d")

    def tell(self, message: bytes) -> None:
        if self.restart_at is not None:
            return
        with contextlib.suppress(OSError):
            os.write(self.worker.messages, message)

    def pulse(self) -> None:
        """Once a second: give a sign of life, look for the others', and see to rounds and newcomers."""
        self.beats += 1
        self.verdict = self.board.fact("verdict")
        sign = {"beats": self.beats, "member": self.worker.member, "host": self.slot.host, "size": self.size}
        knows = self.verdict is not None or self.leaving
        generation, plan = newest_plan(self.board)
        members = [member["id"] for member in plan["members"]] if plan else []
        joined = self.worker.member in members
        self.failed_starts = 0 if joined else self.failed_starts
        sign |= {"ending": knows, "drained": self.drained, "joined": joined, "failed": self.failed_starts}
        self.board.pulse(self.name, sign)
        pulses, gone = self.board.pulses(), set(self.board.facts("gone-"))
        lost = self.watch.look(pulses, self.lease)
        for member in {pulses[name]["member"] for name in lost if name != self.name} - gone:
            self.board.propose(f"gone-{member}", "lost")
            gone.add(member)
        self.end_if_stopped()
        if self.verdict is not None:
            self.ending_since = self.ending_since or time.monotonic()
            if self.worker.member not in members or time.monotonic() - self.ending_since > ENDING:
                self.worker.process.kill()  # it was about to join
            self.take_part()  # in a round that began before the end, and that a slot may leave in
            return
        alive = {pulse["member"] for name, pulse in pulses.items() if name not in lost}
        if self.stopping and not alive - gone:
            self.endings.end_run(EXIT_REQUEUE, "")
        working = (alive - gone) or alive
        leader = next((member for member in members if member in working), min(working))
        if self.worker.member == leader:
            # Also while it waits for an answer itself: that may be for a slot which has answered all there was to.
            if time.monotonic() - self.round_began >= ROUND:
                self.round_began = time.monotonic()
                self.board.call_round(self.board.newest_round() + 1)
            self.ask_for_newcomers(generation, members, alive, gone)
        self.take_part()

    def take_part(self) -> None:
        """Answer horovodrun's newest round, in a thread: it may wait for a slot that never comes."""
        if self.absent_since is None and not self.removed and (newest := self.unanswered()):
            self.round = newest
            self.answer = threading.Thread(target=self.ask_horovodrun, daemon=True)
            self.answer.start()

    def unanswered(self) -> int:
        """The newest round, where this slot has not answered it and waits in no other one either; else 0."""
        if self.answer is not None and self.answer.is_alive():
            return 0
        newest = self.board.newest_round()
        return newest if newest > self.round else 0

    def ask_horovodrun(self) -> None:
        with contextlib.suppress(BoardLost):
            rank, size = self.board.assignment(self.slot.host, self.slot.local_rank)
            self.round = self.board.newest_round()  # all slots answered at once, whatever the round that each was in
            if rank >= 0:
                self.size = size
            else:
                self.removed = self.drained = True
                self.tell(b"d")

    def ask_for_newcomers(self, generation: int, members: list[str], alive: set[str], gone: set[str]) -> None:
        """Tell our worker, and so all, to form a larger generation when newcomers are ready."""
        ready = {m for m in self.board.facts(f"here-{generation + 1}-") if m not in gone and m not in members}
        if not members or not ready or self.asked_generation == generation:
            self.newcomer_since = None
            return
        starting = {member for member in alive if member not in members and member not in gone} - ready
        self.newcomer_since = self.newcomer_since or time.monotonic()
        if not starting or time.monotonic() - self.newcomer_since > NEWCOMERS:
            self.asked_generation = generation
            self.tell(b"r")

    def end_if_stopped(self) -> None:
        """End a worker that somebody has stopped, or that is blocked: the others wait for it."""
        if self.restart_at is not None:
            return
        if self.worker.blocked():
            # It may be within a call to the system that no signal ends: the others need not wait for that.
            self.board.propose(f"gone-{self.worker.member}", "blocked")
            self.worker.process.kill()
        if self.worker.stopped(self.lease):
            self.worker.process.kill()

    def on_end(self, code: int) -> int | None:
        """The worker has ended: the exit code to leave with, or None where another one is to be started."""
        going = self.drained or code == EXIT_REQUEUE
        called = going and bool(self.unanswered())  # asked before the verdict: see may_leave
        if self.restart_at is None:
            self.board.propose(f"gone-{self.worker.member}", "left" if going else describe_end(code))
        verdict = self.board.fact("verdict")
        if verdict is not None:
            return int(verdict["code"])
        if going:
            self.drained = True
            self.restart_at = math.inf
            # Never 0: horovodrun would take that for the end of the run, where it counts on this slot, or does again.
            return EXIT_REQUEUE if self.removed or self.told_again or self.may_leave(called) else None
        if self.restart_at is not None:
            return None
        return self.on_death(code)

    def on_death(self, code: int) -> int | None:
        """The worker has died: the exit code to leave with, or None if another one is to be started, after a pause."""
        worker = self.worker
        if self.stopping:  # `pulse` ends the run when nobody trains any more
            worker.close()
            self.restart_at = math.inf
            return None
        after = self.endings.judge_death(worker.member, code, worker.record, self.failed_starts, self.others())
        self.failed_starts = after.failed_starts
        if after.code is not None:
            return after.code
        # Not given up while others train: horovodrun would take the whole host away, and a single host is the job.
        worker.close()
        self.restart_at = time.monotonic() + after.pause
        return None

    def may_leave(self, called: bool) -> bool:
        """Whether horovodrun will notice before the run ends that this slot is gone: else it counts that as a failure.

        It notices in a round. So this slot leaves when a new one has begun, `called`, while the run goes on: the others
        all answer that one before they end.
        """
        if self.host_goes_on():
            self.absent_since = None
            return False
        self.absent_since = self.absent_since or time.monotonic()
        return called or time.monotonic() - self.absent_since > ENDING

    def host_goes_on(self) -> bool:
        """Whether another slot of this host has a worker, or will: horovodrun ends it if this supervisor leaves."""
        gone = self.board.facts("gone-")
        return any(
            pulse["host"] == self.slot.host and not (pulse["drained"] and pulse["member"] in gone)
            for pulse in self.others()
        )

    def others(self) -> list[dict[str, Any]]:
        """The pulses of the other supervisors that are alive."""
        pulses = self.board.pulses()
        lost = self.watch.look(pulses, self.lease)
        return [pulse for name, pulse in pulses.items() if name != self.name and name not in lost]

    def on_lost_board(self, ended: int | None) -> int | None:
        """horovodrun does not answer; if it is gone, the worker saves and ends, while it can."""
        now = time.monotonic()
        self.lost_since = self.lost_since or now
        if now - self.lost_since > self.lease:
            if ended is not None:
                return EXIT_REQUEUE
            self.tell(b"s")
        if now - self.lost_since > self.lease + ENDING:
            self.worker.process.kill()
        time.sleep(TICK)
        return None

    def wait_until_all_know(self) -> None:
        """Where the run has ended: horovodrun ends those that are slower to hear of it, and calls that a failure."""
        deadline = time.monotonic() + ALL_KNOW
        while time.monotonic() < deadline:
            self.pulse()
            pulses = self.board.pulses()
            lost = self.watch.look(pulses, self.lease)
            if self.verdict is None or all(pulse["ending"] or name in lost for name, pulse in pulses.items()):
                return
            time.sleep(TICK)

    def leave(self, code: int) -> int:
        """Leave. With 0 when horovodrun's round is over: it takes one that ends in a round for one that is there."""
        for number in (signal.SIGTERM, signal.SIGINT):
            # horovodrun has ended meanwhile; its server answers no more, and it kills those that wait for that.
            signal.signal(number, lambda *_: os._exit(code))
        self.leaving = True
        with contextlib.suppress(BoardLost):
            self.wait_until_all_know()
        if self.answer is not None and code == 0:
            self.answer.join(ENDING)
        return code
