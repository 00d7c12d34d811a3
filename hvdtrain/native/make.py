"""From a plan to an installed Horovod by the shortest way: already installed, already built, or built now."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from hvdtrain.native import build, cache, installed
from hvdtrain.native.plan import explain, make_plan
from hvdtrain.system.progress import progress


def make(*, without: Collection[str], jobs: int, wheel_dir: Path | None, force: bool, dry_run: bool) -> None:
    """Do what `hvdtrain horovod build` promises, saying what was done.

    Raises:
        UserError: torch or a compiler is missing, or the folder of wheels is another user's.
        RunError: the build or the installation failed.
    """
    plan = make_plan(without)
    key = plan.key()
    folder = (wheel_dir or cache.wheel_folder()).absolute() / key
    wheel, wrong = cache.find_whole_wheel(folder)
    now = installed.find()
    present = now is not None and now.record is not None and now.record["key"] == key
    if dry_run:
        print(explain(plan))
        done = "installed already" if present else f"in the cache: {wheel}" if wheel else "to be built"
        print(f"  now        {done}")
        return
    if present and not force:
        print(f"Horovod {key} is installed already")
        return
    if wrong:
        print(f"{wrong}; it is built again")
    if wheel is None or force:
        print(explain(plan), flush=True)
        start = time.monotonic()
        with progress() as report:
            wheel = build.build(plan, folder, jobs, report)
        print(f"built {wheel} in {time.monotonic() - start:.0f} s")
    build.install(wheel)
    print(f"installed Horovod {key}")
