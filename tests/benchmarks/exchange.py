"""Step time of ways to exchange gradients, side by side in one run: medians and ratios.

    python -m tests.benchmarks.exchange [--rounds 3] [--steps 20] [--ways none,horovod,ddp,bucketed]

Two ranks with one thread each on this host, taking turns; a way may be followed by +channels-last and +malloc (glibc
keeps freed memory).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

from hvdtrain.launch import command

ROOT = Path(__file__).parents[2]
# Keeps memory that is freed: gradients and activations of each step otherwise cost thousands of page faults.
MALLOC = {
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def seconds_of(way: str, steps: int) -> list[float]:
    """Step seconds of rank 0 of two, without the first steps, which warm up."""
    name, *more = way.split("+")
    line = [sys.executable, "-m", "tests.benchmarks.step_rank", name, "--steps", str(steps)]
    line += ["--channels-last"] if "channels-last" in more else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "BENCH_MASTER": "127.0.0.1"}
    env |= {"BENCH_PORT": str(free_port())}
    if "malloc" in more:
        env |= MALLOC
    horovodrun = command.find_program("horovodrun")
    done = subprocess.run(
        [horovodrun, "-np", "2", "--gloo", *line], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    found = [text for text in done.stdout.splitlines() if "SECONDS" in text]
    if not found:
        raise RuntimeError(f"{way} failed:\n{done.stdout}\n{done.stderr}")
    values: list[float] = json.loads(found[0].split("SECONDS")[1])
    return values[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ways", default="none,horovod,ddp,ddp+channels-last,bucketed,bucketed+channels-last")
    options = parser.parse_args()
    ways = options.ways.split(",")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            seconds[way] += seconds_of(way, options.steps)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    for way, median in medians.items():
        ratios = "  ".join(f"{medians[other] / median:.2f}x {other}" for other in ways if other != way)
        print(f"{way:32} {median * 1e3:7.1f} ms   {ratios}")


if __name__ == "__main__":
    main()
