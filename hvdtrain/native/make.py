"""From a plan to an installed Horovod by the shortest way: already installed, in the cache, or built now."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.native import build, cache, installed
from hvdtrain.native.plan import make_plan
from hvdtrain.native.torchinfo import explain_untested_torch
from hvdtrain.system.progress import show_stages


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options of `hvdtrain horovod build`.

    Attributes:
        without: Parts to leave out: "mpi", "nccl".
        mpi: Prefix of the MPI to build with, "none", or None to search for one.
        jobs: Number of files to compile at once.
        wheel_dir: Where wheels are kept; None for the user's cache folder.
        force: Build and install even if it is installed or in the cache.
        dry_run: Only print the plan.
    """

    without: Collection[str] = ()
    mpi: str | None = None
    jobs: int = 1
    wheel_dir: Path | None = None
    force: bool = False
    dry_run: bool = False

    def command_arguments(self, wheel_dir: Path) -> list[str]:
        """Return these options as arguments of `hvdtrain horovod build`, with `wheel_dir` for the wheels."""
        arguments = [f"--jobs={self.jobs}", f"--wheel-dir={wheel_dir}", *(f"--without={part}" for part in self.without)]
        arguments += [f"--mpi={self.mpi}"] if self.mpi is not None else []
        return arguments + ["--force"] * self.force + ["--dry-run"] * self.dry_run


def provide_horovod(options: BuildOptions) -> None:
    """Install the Horovod that fits this machine, and print what was done.

    Raises:
        UserError: torch or a compiler is missing, or another user may write to the folder of wheels.
        RunError: The build or the installation failed.
    """
    plan = make_plan(options.without, options.mpi)
    untested = explain_untested_torch(plan.torch)
    if untested:
        print(untested, file=sys.stderr)
    key = plan.make_record().cache_key()
    folder = (options.wheel_dir or cache.wheel_folder()).absolute() / key
    wheel, damage = cache.find_whole_wheel(folder)
    current = installed.find_horovod()
    present = current is not None and current.record is not None and current.record.cache_key() == key
    if options.dry_run:
        print(plan.describe_parts())
        state = "already installed" if present else f"in the cache: {wheel}" if wheel else "to be built"
        print(f"  now        {state}")
        return
    if present and not options.force:
        print(f"Horovod {key} is already installed")
        return
    if damage:
        print(f"{damage}; building it again")
    if wheel is None or options.force:
        print(plan.describe_parts(), flush=True)
        start = time.monotonic()
        with show_stages() as report:
            wheel = build.build_wheel(plan, folder, options.jobs, report)
        print(f"built {wheel} in {time.monotonic() - start:.0f} s")
    build.install_wheel(wheel)
    print(f"installed Horovod {key}")
