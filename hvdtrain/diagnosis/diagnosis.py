"""`--diagnose`: where each rank's time goes, whom the others wait for, and whether all replicas are still the same."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.diagnosis.comparison import Comparison
from hvdtrain.diagnosis.drift import find_drift, hash_checksums
from hvdtrain.diagnosis.report import FinalSummary, WorldHistory
from hvdtrain.diagnosis.straggler import TIME_PARTS, StepTimes
from hvdtrain.recipe.framework import Step
from hvdtrain.system.errors import RunError
from hvdtrain.system.gpu import GpuMonitor, GpuReading
from hvdtrain.system.records import encode_record, parse_record

MIN_INTERVAL_STEPS = 10  # steps from one comparison to the next: fewer show little of a straggler


class Diagnosis:
    """Collects the times of this rank's steps in one world; all ranks compare them, and their weights, at intervals.

    The loop hands over its batches, reports when an exchange has ended, and asks to compare after a step's update.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        log_every: int,
        gpu: GpuMonitor,
        from_step: int,
        earlier: Sequence[WorldHistory],
    ) -> None:
        """Begin after `from_step` in a run folder; gpu: this rank's; earlier: of this run's earlier worlds."""
        self.world, self._gpu = world, gpu
        self.interval = -(-MIN_INTERVAL_STEPS // log_every) * log_every
        ranks = collectives.gather_json([world.host, gpu.uuid is not None], "diagnose.hosts")
        hosts: list[str] = [host for host, _ in ranks]
        self._has_gpus = any(has_gpu for _, has_gpu in ranks)
        self.comparison = Comparison(hosts, folder / "diagnose.json", from_step, earlier)
        self._step_times: list[list[float]] = []  # of each step since the last comparison: seconds by TIME_PARTS
        self._data_seconds = 0.0  # seconds that this step has waited for batches
        self._last_end_time = time.perf_counter()  # when the last exchange, or comparison, ended

    def time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches; the wait for them is this rank's data time."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data_seconds += time.perf_counter() - begin
            yield batch

    def record_exchange(self, start: float, waited: float) -> None:
        """Record that an exchange has ended.

        Args:
            start: when its step began, by time.perf_counter.
            waited: seconds that this rank waited for the exchange.
        """
        now = time.perf_counter()
        compute = now - start - self._data_seconds - waited
        row = {"data": self._data_seconds, "compute": compute, "wait": waited, "between": start - self._last_end_time}
        self._step_times.append([row[part] for part in TIME_PARTS])
        self._data_seconds, self._last_end_time = 0.0, now

    def is_comparison_due(self, step: int) -> bool:
        return step % self.interval == 0

    def compare_ranks(self, step: Step, number: int, *, ends: bool) -> list[str]:
        """Compare this world's ranks after a step; all call it. Returns lines to print.

        Raises RunError on all ranks if their replicas differ: a checkpoint would hold the state of one rank alone. It
        is called before anything is saved.
        """
        held = self.comparison.last_step  # after which the replicas were the same
        if not self._step_times and number == held:  # the evaluation after it has ended the run
            return self._report_end() if ends else []
        checksums = step.checksum_state()
        rows = np.array(self._step_times)
        mine = np.append(rows.view(np.int64).reshape(-1), np.int64(hash_checksums(checksums)))
        everyone = collectives.gather_array(mine, "diagnose.times")
        columns = [range(place, len(everyone), self.world.replica_ranks) for place in range(self.world.replica_ranks)]
        drift = None
        if any(len({everyone[rank, -1] for rank in column}) > 1 for column in columns):
            drift = find_drift(collectives.gather_json(checksums, "diagnose.drift"), columns)
        times: StepTimes = everyone[:, :-1].copy().view(np.float64).reshape(-1, *rows.shape).transpose(1, 0, 2)
        lines = self.comparison.add_interval(times, number, gpus=self._gather_gpus())
        if drift is not None:
            text = self.comparison.record_drift(drift, number)
            self._write_report()
            collectives.gather_json(None, "diagnose.written")  # the first rank to leave ends the others
            raise RunError(f"the replicas differ after step {number}, and were the same after step {held}: {text}")
        lines = self._report_end() if ends else [*lines, *self._write_report()]
        self._step_times.clear()
        self._last_end_time = time.perf_counter()
        return lines

    def _gather_gpus(self) -> list[GpuReading | None]:
        """Return the state of each rank's GPU; nothing if no rank has one."""
        if not self._has_gpus:
            return []
        found: Any = collectives.gather_json(encode_record(self._gpu.read()), "diagnose.gpus")
        return [reading and parse_record(reading, GpuReading) for reading in found]

    def _report_end(self) -> list[str]:
        """Write the report of a run that ends; return lines to print."""
        end, lines = self.comparison.conclude()
        return lines + self._write_report(end)

    def _write_report(self, end: FinalSummary | None = None) -> list[str]:
        return self.comparison.write_report(end) if self.world.rank == 0 else []

    def build_history(self) -> list[WorldHistory]:
        """Return what the next world is to know of this one and those before it."""
        own = self.comparison.build_history()
        return [*self.comparison.earlier_worlds, *([own] if own is not None else [])]
