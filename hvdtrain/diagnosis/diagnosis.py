"""`--diagnose`: where each rank's time goes, whom the others wait for, and whether all replicas are still the same."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.diagnosis.drift import Drift, digest, find_drift
from hvdtrain.diagnosis.straggler import PARTS, Straggler, Times, name_straggler
from hvdtrain.recipe.framework import Step
from hvdtrain.system.errors import RunError
from hvdtrain.system.files import trouble, write_json

INTERVAL = 10  # steps from one comparison to the next: fewer say little about a straggler
LAST = 1000  # steps that the end's table is about
KEPT = 30  # intervals in diagnose.json
SHOWN = 8  # ranks in a table


class Diagnosis:
    """The times of this rank's steps in one world, which all ranks compare at intervals, and their weights with them.

    The loop hands over its batches, tells when an exchange has ended, and asks to compare after a step's update.
    """

    def __init__(
        self, world: World, folder: Path, log_every: int, from_step: int, earlier: list[dict[str, Any]]
    ) -> None:
        """earlier: the histories of this run's earlier worlds."""
        self.world, self.path, self.earlier = world, folder / "diagnose.json", earlier
        self.every = -(-INTERVAL // log_every) * log_every
        self.from_step = self.compared = from_step
        self.hosts: list[str] = collectives.gather_json(world.host, "diagnose.hosts")
        self._rows: list[list[float]] = []  # of each step since the last comparison: seconds by PARTS
        self._data = 0.0  # seconds that this step has waited for batches
        self._mark = time.perf_counter()  # when the last exchange, or comparison, ended
        self._last: deque[Times] = deque(maxlen=LAST)  # all ranks' times, (1, ranks, PARTS)
        self._intervals: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._named: dict[str, int] = {}  # intervals, by the rank that was named
        self._shown: Any = ""  # who was named in the last table
        self._unwritten = False  # told that diagnose.json cannot be

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what they take to come is this rank's data time."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data += time.perf_counter() - begin
            yield batch

    def exchanged(self, start: float, waited: float) -> None:
        """An exchange has ended. start: of its step, by time.perf_counter. waited: seconds of the exchange."""
        now = time.perf_counter()
        compute = now - start - self._data - waited
        row = {"data": self._data, "compute": compute, "wait": waited, "between": start - self._mark}
        self._rows.append([row[part] for part in PARTS])
        self._data, self._mark = 0.0, now

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def compare(self, step: Step, number: int, *, ends: bool) -> list[str]:
        """Compare this world's ranks after a step; all call it. Returns lines for people.

        Raises RunError on all ranks where their replicas differ: what they train then is no model any more, and a
        checkpoint would be one rank's opinion. It is called before anything is saved.
        """
        checksums = step.checksums()
        rows = np.array(self._rows)
        mine = np.append(rows.view(np.int64).reshape(-1), np.int64(digest(checksums)))
        everyone = collectives.gather_array(mine, "diagnose.times")
        drift = (
            find_drift(collectives.gather_json(checksums, "diagnose.drift")) if len(set(everyone[:, -1])) > 1 else None
        )
        times: Times = everyone[:, :-1].copy().view(np.float64).reshape(-1, *rows.shape).transpose(1, 0, 2)
        self._last.extend(times[i : i + 1] for i in range(len(times)))
        straggler = name_straggler(times)
        first, self.compared = self.compared + 1, number
        if straggler is not None:
            key = self.rank(straggler.rank)
            self._named[key] = self._named.get(key, 0) + 1
        self._intervals.append({"first_step": first, "last_step": number, **self._told(times, straggler)})
        if drift is not None:
            self._write(number, drift=drift)
            collectives.gather_json(None, "diagnose.written")  # the first rank to leave ends the others
            raise RunError(self._describe(drift, first - 1, number))
        lines: list[str] = []
        who = straggler and (straggler.rank, straggler.cause)
        if who != self._shown:
            lines = self._table(times, straggler, f"steps {first} to {number}")
            self._shown = who
        whole = np.concatenate(self._last) if ends else None
        if whole is not None:
            lines = self._table(whole, name_straggler(whole), f"the last {len(whole)} steps")
            named = [f"{rank} in {count}" for rank, count in sorted(self._named.items())]
            if named:
                lines.append(f"          named in intervals of {self.every} steps: {', '.join(named)}")
        lines += self._write(number, whole)
        self._rows.clear()
        self._mark = time.perf_counter()
        return lines

    def history(self) -> list[dict[str, Any]]:
        """What is to be known of this world and those before it in the next one."""
        if self.compared == self.from_step:
            return self.earlier
        own = {"first_step": self.from_step + 1, "last_step": self.compared, "ranks": self.world.size}
        return [*self.earlier, {**own, "named": self._named}]

    def rank(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _told(self, times: Times, straggler: Straggler | None) -> dict[str, Any]:
        """Medians and verdict, for JSON."""
        medians = np.median(times, axis=0).round(6).tolist()
        found = straggler and {"host": self.hosts[straggler.rank], **straggler.row()}
        return {"seconds": [dict(zip(PARTS, row, strict=True)) for row in medians], "straggler": found}

    def _write(self, number: int, whole: Times | None = None, drift: Drift | None = None) -> list[str]:
        """Rank 0 writes diagnose.json; a line for people where it begins to be impossible, which ends no run."""
        if self.world.rank != 0:
            return []
        found = None
        if drift is not None:
            ranks = [{"rank": rank, "host": self.hosts[rank]} for rank in drift.ranks]
            found = {"step": number, "tensor": drift.tensor, "majority": drift.majority, "ranks": ranks}
            found["tensors"] = drift.tensors
        end = None
        if whole is not None:
            end = {"steps": len(whole), **self._told(whole, name_straggler(whole))}
        told = {
            "first_step": self.from_step + 1,
            "last_step": number,
            "hosts": self.hosts,
            "end": end,
            "named": self._named,
            "intervals": list(self._intervals),
            "drift": found,
            "earlier_worlds": self.earlier,
        }
        before, self._unwritten = self._unwritten, False
        try:
            write_json(self.path, told)
        except OSError as problem:
            self._unwritten = True
            return [] if before else [f"diagnose  {trouble(self.path.name, self.path.parent, problem)}"]
        return []

    def _table(self, times: Times, straggler: Straggler | None, steps: str) -> list[str]:
        medians = 1000 * np.median(times, axis=0)
        ranks = sorted(range(len(medians)), key=lambda rank: float(medians[rank, PARTS.index("wait")]))
        shown = ranks if len(ranks) <= SHOWN else [*ranks[: SHOWN // 2], *ranks[-SHOWN // 2 :]]
        width = max(len(self.rank(rank)) for rank in shown)
        title = f"diagnose  {steps}, medians in ms"
        lines = [title, f"          {'':{width}}" + "".join(f"{part:>9}" for part in PARTS)]
        for rank in sorted(shown):
            lines.append(f"          {self.rank(rank):{width}}" + "".join(f"{value:9.1f}" for value in medians[rank]))
        if len(shown) < len(ranks):
            lines.append(f"          and {len(ranks) - len(shown)} ranks that wait neither least nor most")
        return [*lines, f"          {self._verdict(straggler)}"]

    def _verdict(self, straggler: Straggler | None) -> str:
        if self.world.size == 1:
            return "one rank: there is nothing to compare"
        if straggler is None:
            return "no straggler"
        return (
            f"straggler {self.rank(straggler.rank)}: the others wait {1000 * straggler.cost:.1f} ms a step for it, "
            f"{straggler.share:.0%} of the step; its {straggler.cause} takes {1000 * straggler.longer:.1f} ms longer "
            "than theirs"
        )

    def _describe(self, drift: Drift, held: int, number: int) -> str:
        who = ", ".join(self.rank(rank) for rank in drift.ranks)
        if drift.majority:
            what = f"on {who}, {drift.tensor} is not what it is on the other {self.world.size - len(drift.ranks)} ranks"
        else:
            what = f"{drift.tensor} is not the same on {who}, no more than half of which agree"
        count = drift.tensors - 1
        more = f"; {count} more tensor{'s' * (count > 1)} differ{'s' * (count == 1)}" if count else ""
        return f"the replicas differ after step {number}, and were the same after step {held}: {what}{more}"
