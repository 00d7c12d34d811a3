"""How long it takes from the command to a program's first step: `hvdtrain launch` against the program's own launcher.

    python -m tests.benchmarks.program_start [--rounds 5] [--programs torch_ddp.py ...]

Each starts the same unchanged program of tests/programs on two ranks of this host, and the time counts until rank 0
prints its first step. The ways of a program take turns, and each round begins with another. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.start import ROOT, environment
from tests.benchmarks.tables import Table, publish

RANKS = "2"
LONGEST = 120  # seconds of a run
FIRST_STEP = b"step 0 "
# What mpirun, with which `accelerate launch` starts processes on CPUs, needs to run as root.
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def launchers(hostfile: Path) -> dict[str, list[str]]:
    """What goes before the program, for each way."""
    own = Path(sys.executable).parent
    accelerate = [str(own / "accelerate"), "launch", "--cpu", "--num_machines", "1", "--num_processes", RANKS]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no", "--mpirun_hostfile", str(hostfile)]
    return {
        "hvdtrain launch": [sys.executable, "-m", "hvdtrain", "launch", "-np", RANKS],
        "torchrun": [str(own / "torchrun"), "--nproc-per-node", RANKS],
        "accelerate launch": accelerate,
        "horovodrun": [str(own / "horovodrun"), "-np", RANKS, "--gloo", sys.executable],
    }


# The programs, and the ways that can start each; hvdtrain's is compared with each of the others.
WAYS = {
    "torch_ddp.py": ["hvdtrain launch", "torchrun"],
    "accelerate_loop.py": ["hvdtrain launch", "torchrun", "accelerate launch"],
    "horovod_torch.py": ["hvdtrain launch", "horovodrun"],
}


def seconds_to_first_step(line: Sequence[str]) -> float:
    """Run a command line to its end; how long it took to the first step. Raises RuntimeError if it fails."""
    begin = time.monotonic()
    process = subprocess.Popen(
        line,
        env=environment([]) | AS_ROOT,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    said, taken = b"", None
    with process.stdout:
        while text := os.read(process.stdout.fileno(), 1 << 16):
            said += text
            if taken is None and FIRST_STEP in said:
                taken = time.monotonic() - begin
            if time.monotonic() > begin + LONGEST:
                os.killpg(process.pid, signal.SIGKILL)
    if process.wait(LONGEST) != 0 or taken is None:
        raise RuntimeError(f"{' '.join(line)} ended with code {process.returncode}:\n{said.decode(errors='replace')}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="FILE")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        hostfile = Path(folder) / "hosts"
        hostfile.write_text(f"localhost slots={RANKS}\n")
        before = launchers(hostfile)
        for program in options.programs:
            ways = WAYS[program]
            taken: dict[str, list[float]] = {}
            for number in range(options.rounds):
                turn = number % len(ways)
                for name in ways[turn:] + ways[:turn]:
                    line = [*before[name], str(ROOT / "tests" / "programs" / program)]
                    taken.setdefault(name, []).append(seconds_to_first_step(line))
                    print(f"round {number + 1}: {program}, {name}: {taken[name][-1]:.2f} s", file=sys.stderr)
            median = {name: statistics.median(taken[name]) for name in ways}
            for name in ways:
                ratio = median["hvdtrain launch"] / median[name]
                values = [f"{value:.2f}" for value in (median[name], min(taken[name]), max(taken[name]))]
                rows.append([f"`{program}`", name, *values, "" if name == ways[0] else f"{ratio:.2f}"])
    caption = f"Seconds from the command to the first step, {RANKS} ranks on one host, {options.rounds} rounds."
    columns = ["program", "way", "median", "least", "most", "hvdtrain launch against it"]
    publish(options.json, [Table(columns, rows, caption)])


if __name__ == "__main__":
    main()
