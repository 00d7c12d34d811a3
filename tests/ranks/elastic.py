"""Elastic runs on this host, with faults: `localhost`, `127.0.0.1`, ... count as hosts, each with its own slots."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.ranks.harness import BIN, HVDTRAIN, ROOT, Job, rows, train, wait_for_step
from tests.support.limits import stretch

RECIPE = str(ROOT / "tests" / "ranks" / "slow_recipe.py")
LEASE = 3.0  # seconds
MESSAGE = re.compile(r"##hvdtrain \w+ (\{.*\})")


class ElasticJob(Job):
    """An elastic run of the slow recipe under bare horovodrun, or under `hvdtrain launch`, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        hosts: str,
        *options: str,
        least: int = 1,
        most: int = 4,
        launch: list[str] | None = None,
        env: dict[str, str] | None = None,
        recipe: str = RECIPE,
    ) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.output, self.fault = folder / "output", folder / "fault"
        self.hosts(hosts)
        script = folder / "discover.sh"
        script.write_text(f'#!/bin/sh\ncat "{folder}/hosts"\n')
        script.chmod(0o755)
        train = [recipe, "--run-dir", str(self.run_dir), "--fault", str(self.fault), "--log-every", "1"]
        train += ["--threads", "1", *options]
        bounds = ["--min-np", str(least), "--max-np", str(most)]
        if launch is None:
            command = [str(BIN / "horovodrun"), "--gloo", "-np", str(least), *bounds]
            command += ["--host-discovery-script", str(script), "--network-interfaces", "lo", *HVDTRAIN, "train"]
        else:
            command = [*HVDTRAIN, "launch", "--elastic", *bounds, "--discovery", str(script), "--nic", "lo", *launch]
        env = {"HVDTRAIN_LEASE": str(LEASE), "HVDTRAIN_MIN_NP": str(least), **(env or {})}
        if launch is None:
            env["HVDTRAIN_LAUNCH"] = "1"  # so that ranks tell who they are
        super().__init__([*command, *train], env, folder, self.output)

    def hosts(self, text: str) -> None:
        """What the discovery script prints from now on."""
        beside = self.folder / "hosts.new"
        beside.write_text(text.replace(" ", "\n") + "\n")
        beside.replace(self.folder / "hosts")

    def step(self, number: int) -> None:
        """Wait until so many steps are done."""
        try:
            wait_for_step(self.run_dir, number)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def done(self) -> int:
        return len(rows(self.run_dir))

    def more(self, steps: int) -> None:
        """Wait for that many more steps."""
        self.step(self.done() + steps)

    def stands_still(self, seconds: float) -> bool:
        """Whether no step was done for so long; for as long nothing else is done either."""
        done = self.done()
        time.sleep(seconds)
        return self.done() == done

    def said(self) -> str:
        return self.output.read_text()

    def messages(self, kind: str) -> list[dict[str, Any]]:
        found = [json.loads(text) for text in MESSAGE.findall(self.said())]
        return [message for message in found if message["kind"] == kind]

    def worker(self, rank: int) -> psutil.Process:
        """The living process that has last said that it is this rank."""
        told = [message for message in self.messages("started") if message["rank"] == rank]
        return psutil.Process(told[-1]["pid"])

    def supervisor(self, rank: int) -> psutil.Process:
        parent = self.worker(rank).parent()
        assert parent is not None
        return parent

    def kill(self, *ranks: int, number: int = signal.SIGKILL) -> None:
        for process in [self.worker(rank) for rank in ranks]:
            process.send_signal(number)

    def kill_and_rejoin(self, *ranks: int, world: int, left: int) -> None:
        """Kill one rank after the other: each time so many are left, and train; then all are there again, and train."""
        for rank in ranks:
            self.kill(rank)
            self.world(left)
            self.more(2)
            self.world(world)
            self.more(2)

    def kill_any(self) -> None:
        """Kill some worker."""
        self.those(lambda process: "HVDTRAIN_MEMBER" in process.environ())[0].kill()

    def world(self, size: int, timeout: float = 40) -> None:
        """Wait until as many ranks as this train together; the run does not come to its end before newcomers join."""
        grows = size > self.world_size() > 0
        self.until(lambda: self.world_size() == size, f"a world of {size}", timeout, hold=grows)

    def world_size(self) -> int:
        """Of the newest generation that rank 0 told of."""
        sizes = re.findall(r"(?:world     (\d+) rank|global = (\d+) rank)", self.said())
        return int(sizes[-1][0] or sizes[-1][1]) if sizes else 0

    def until(self, true: Callable[[], bool], what: str, timeout: float = 40, hold: bool = False) -> None:
        """Wait for it; with `hold` a pass of the slow recipes takes 2 s meanwhile, since the run has few steps."""
        deadline = time.monotonic() + stretch(timeout)
        with self.held() if hold else contextlib.nullcontext():
            while not true():
                assert time.monotonic() < deadline, f"no {what} within {stretch(timeout)} s\n{self.said()}"
                assert self.process.poll() is None, f"ended before {what}\n{self.said()}"
                time.sleep(0.05)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the run come no nearer to its end than a pass of the slow recipes in 2 s."""
        mark = Path(f"{self.fault}.hold")
        mark.touch()
        try:
            yield
        finally:
            mark.unlink(missing_ok=True)

    def end(self, code: int = 0, timeout: float = 100, hurry: bool = True) -> None:
        """Wait for the end of the run, with this exit code, and for the end of all it started.

        There are no more faults: if none waits to be taken, the rest of the steps need no pause.
        """
        if hurry and not self.fault.exists():
            self.fault.write_text("hurry")
        try:
            done = self.finish(timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None
        assert done.returncode == code, f"exit {done.returncode}\n{self.said()}"

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return found


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, each of which must be there once, in order."""
    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1)), [row["step"] for row in found]
    return [row["loss"] for row in found]


def train_reference(folder: Path, recipe: str, *options: str) -> list[float]:
    """Train without a fault, on one rank; return the losses."""
    train("alone", 1, recipe, folder / "run", "--pause", "0", "--log-every", "1", "--threads", "1", *options)
    return losses(folder / "run")


def check_losses(job: ElasticJob, expected: Sequence[float]) -> None:
    """Fail unless each step was made once, with the losses of one rank, and the ledger says so too."""
    found = losses(job.run_dir)
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    verify(job.run_dir)


def verify(run_dir: Path, verdict: str = "exactly once") -> None:
    """Fail unless the ledger says that every epoch visited every example exactly once, or another verdict."""
    done = subprocess.run([*HVDTRAIN, "ledger", "verify", str(run_dir)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(verdict), done.stdout + done.stderr
