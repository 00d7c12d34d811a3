"""A rank's reports of its steps to rank 0, and rank 0's comparison of them, in a thread next to the training."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from hvdtrain.comm.mailbox import Mailbox
from hvdtrain.diagnosis.gathering import Gathering, RankReport, StateChecksums
from hvdtrain.programs.step_clock import StepClock, StepMarks
from hvdtrain.system.gpu import GpuMonitor, GpuReading
from hvdtrain.system.limits import DiagnosisLimits
from hvdtrain.system.records import encode_record, parse_record
from hvdtrain.system.stolen_time import StolenTimeMonitor
from hvdtrain.system.tcp_info import TcpMonitor

BEAT_SECONDS = 0.02  # between two looks of the thread: a process that stops for longer is noticed
REPORT_SECONDS = 0.5  # between two reports of a rank
REPORTS_PER_SECOND = 50  # of all ranks together: rank 0 trains as well


class PendingChecksums:
    """Checksums that a device may still compute."""

    def __init__(self, step: int, names: list[str], values: torch.Tensor) -> None:
        """Keep the (n,) int64 checksums of named tensors after a step."""
        self.step, self.names = step, names
        self._done: Any = None  # an event of the GPU
        if values.is_cuda:
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            on_host.copy_(values, non_blocking=True)
            self._values, self._done = on_host, torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        else:
            self._values = values

    def is_done(self) -> bool:
        """Return whether the values are there."""
        return self._done is None or bool(self._done.query())

    def read(self) -> StateChecksums:
        """Return the values that are there."""
        return StateChecksums(self.step, self._values.tolist(), self.names)


class Reporter:
    """Sends the steps that are added to it; on rank 0, also receives, compares and prints."""

    def __init__(self, mailbox: Mailbox, path: Path, stolen_time: StolenTimeMonitor, gpu_uuid: str | None) -> None:
        """Start the thread.

        Args:
            mailbox: to rank 0.
            path: of diagnose.json, which rank 0 writes.
            stolen_time: which the thread helps to measure.
            gpu_uuid: of the GPU that this rank computes on, if there is one.
        """
        self.mailbox = mailbox
        self._stolen_time, self._traffic, self._gpu = stolen_time, TcpMonitor(), GpuMonitor(gpu_uuid)
        self._steps: deque[tuple[StepMarks, StepClock]] = deque()
        self._checksums: deque[PendingChecksums] = deque()
        self._gathering = Gathering(mailbox.size, path) if mailbox.rank == 0 else None
        self._stop, self._failed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="hvdtrain.diagnose", daemon=True)
        self._thread.start()

    def add_step(self, marks: StepMarks, clock: StepClock) -> None:
        """Add a step of this rank."""
        self._steps.append((marks, clock))

    def add_checksums(self, checksums: PendingChecksums) -> None:
        """Add the checksums of this rank's parameters."""
        self._checksums.append(checksums)

    def end(self, *, failed: bool) -> None:
        """Send the rest and, on rank 0, report; not if the program has failed: then nobody waits for another rank."""
        self._failed = failed
        self._stop.set()
        is_root = self._gathering is not None
        if failed:
            self._thread.join(DiagnosisLimits.report if is_root else 0)
        else:
            self._thread.join(DiagnosisLimits.last_messages * (2 if is_root else 1))

    def _run(self) -> None:
        try:
            self._report_until_end()
        except (OSError, RuntimeError, ValueError) as error:  # of the store, the network, or what arrives there
            if not self._failed:
                print(f"hvdtrain: diagnose has stopped: {error}", file=sys.stderr, flush=True)
        finally:
            self.mailbox.close()
            self._gpu.close()

    def _report_until_end(self) -> None:
        pause = max(REPORT_SECONDS, self.mailbox.size / REPORTS_PER_SECOND)
        due = time.monotonic() + pause
        while not self._stolen_time.sleep(self._stop, BEAT_SECONDS):
            if time.monotonic() >= due:
                if self.mailbox.is_ready():
                    self._send_report(ended=False)
                    self._receive_reports()
                due = time.monotonic() + pause
        deadline = time.monotonic() + DiagnosisLimits.last_messages
        while not self._failed and not self.mailbox.is_ready() and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS)
        if self._gathering is None:
            if not self._failed and self.mailbox.is_ready():
                self._send_report(ended=True)
            return
        self._send_report(ended=True)
        while not (self._failed or self._gathering.have_all_ended() or time.monotonic() >= deadline):
            self._receive_reports()
            time.sleep(BEAT_SECONDS)
        print_lines(self._gathering.conclude())

    def _send_report(self, *, ended: bool) -> None:
        rows, checksums = [], []
        while self._steps and self._steps[0][1].has_passed(self._steps[0][0].end):
            marks, clock = self._steps.popleft()
            rows.append(marks.read(clock))
        while self._checksums and self._checksums[0].is_done():
            checksums.append(self._checksums.popleft().read())
        traffic = self._traffic.read_changes() if self.mailbox.size > 1 else []
        report = RankReport(
            rank=self.mailbox.rank,
            host=socket.gethostname(),
            rows=rows,
            traffic=traffic,
            checksums=checksums,
            gpu=self._read_gpu(),
            ended=ended,
        )
        if self._gathering is not None:
            self._gathering.add_report(report)
        else:
            self.mailbox.send(json.dumps(encode_record(report)).encode())

    def _read_gpu(self) -> GpuReading | None:
        """Return the state of this rank's GPU; print what cannot be known on rank 0, and an alarm on any rank."""
        reading = self._gpu.read()
        if (alarm := self._gpu.take_alarm()) is not None:
            print(f"hvdtrain: warning: {alarm}", file=sys.stderr, flush=True)
        notes = self._gpu.take_notes()
        print_lines(f"diagnose  {note}" for note in notes if self.mailbox.rank == 0)
        return reading

    def _receive_reports(self) -> None:
        if self._gathering is not None:
            for message in self.mailbox.receive():
                self._gathering.add_report(parse_record(json.loads(message), RankReport))
            print_lines(self._gathering.compare_ranks())


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as one, so that the program's own output does not come in between."""
    text = "\n".join(lines)
    if text:
        print(text, flush=True)
