"""An elastic run that makes no progress ends, by whatever each try dies of; a stop is heeded between tries."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.ranks.harness import HVDTRAIN, ROOT, Job
from tests.support.limits import stretch
from tests.support.slow_cases import slow

RECIPE = str(ROOT / "tests" / "ranks" / "ending_recipe.py")


def elastic(folder: Path, *options: str) -> list[str]:
    command = [*HVDTRAIN, "launch", "--elastic", "-H", "localhost:2", RECIPE, "--run-dir", str(folder / "run")]
    return [*command, "--quiet", "--at-step", "5", *options]


@pytest.mark.parametrize(
    ("how", "cause"),
    [("segv", r"was killed by signal 11 \(SIGSEGV\)"), *slow(("os-exit0", "ended with code 0"))],
)
def test_a_step_that_always_kills_ends_the_run(tmp_path: Path, how: str, cause: str) -> None:
    with Job(elastic(tmp_path, "--how", how)) as job:
        done = job.finish()
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    why = r"hvdtrain: error: rank \d on \S+ failed: no progress: step 5 was not passed in 3 tries; in the last one, "
    assert re.search(rf"^{why}a worker on \S+ {cause} while it was computing gradients$", done.stderr, re.M), said
    # Each generation that makes a step leaves a segment; it begins with step 1, or, if a rank dies later than the
    # other, with what that one has reached: step 4, or step 3 if it had no sum of the fourth yet (on a loaded machine).
    # A generation that begins farther than all before it counts as progress (hvdtrain/elastic/tries.py). So there are
    # at most 2 that begin with step 1, then 3 since one has begun after step 3, 3 since one has begun after step 4, and
    # 1 that the other slot began when the run was given up. Without a rank that has reached 3 steps there are 6.
    segments = list((tmp_path / "run" / "ledger").glob("segment-*"))
    assert 1 <= len(segments) <= 9, segments


@pytest.mark.slow
def test_workers_that_cannot_start_any_more_end_the_run(tmp_path: Path) -> None:
    """The first ones died in mid-run; later ones die before they join."""
    marker = tmp_path / "done"
    recipe = tmp_path / "dies.py"
    recipe.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "from tests.ranks.ending_recipe import Ending\n"
        "@dataclass(kw_only=True)\n"
        "class Dies(Ending):\n"
        "    def model(self):\n"
        f"        if Path({str(marker)!r}).exists(): os._exit(7)\n"
        "        return super().model()\n"
        "    def score(self, model, batch):\n"
        f"        if self.steps_begun == 5: Path({str(marker)!r}).touch(); os._exit(8)\n"
        "        return super().score(model, batch)\n"
    )
    command = [*HVDTRAIN, "launch", "--elastic", "-H", "localhost:2", str(recipe), "--run-dir", str(tmp_path / "run")]
    with Job([*command, "--quiet"]) as job:
        done = job.finish()
    assert done.returncode == 1
    assert "no worker starts any more: a worker on localhost ended with code 7" in done.stderr, done.stderr
    # A try without a step leaves no segment and no event file.
    assert len(list((tmp_path / "run" / "ledger").glob("segment-*"))) == 1
    assert len(list((tmp_path / "run" / "tensorboard").glob("events*"))) <= 1


@pytest.mark.slow
def test_a_stop_between_two_tries(tmp_path: Path) -> None:
    # One slot: its second pause is of 2 s, in which no worker is there.
    command = [word.replace("localhost:2", "localhost:1") for word in elastic(tmp_path, "--how", "os-exit5")]
    with Job(command) as job:
        deadline = time.monotonic() + stretch(60)
        while job.ranks() == [] and time.monotonic() < deadline:
            time.sleep(0.1)
        starts, gone_since = 0, None
        while time.monotonic() < deadline:
            workers = [process for process in job.ranks() if "HVDTRAIN_MEMBER" in process.environ()]
            if workers:
                starts, gone_since = starts + 1, None
            elif starts:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > 0.5:
                    break
            time.sleep(0.05)
        begun = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(timeout=40)
    assert done.returncode == 75, done.stderr
    assert time.monotonic() - begun < 25, done.stderr
