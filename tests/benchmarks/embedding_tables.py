"""A step with 26 dealt embedding tables, against torchrec's on CPUs, in turns in the same processes.

    python -m tests.benchmarks.embedding_tables --python VENV/bin/python

torchrec is in no environment of hvdtrain: VENV is one that sees hvdtrain's packages (a .pth file) and has
`torchrec==1.9.2 fbgemm-gpu-cpu==1.9.0`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.tables import ROOT, Table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=512, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a way in a round")
    options = parser.parse_args()
    sizes = [options.rows, options.batch, options.rounds, options.steps]
    launcher = Path(sys.executable).with_name("horovodrun")
    command = [launcher, "-np", "2", "--gloo", options.python, "-m", "tests.benchmarks.embedding_tables_rank"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *map(str, sizes)], env=env, capture_output=True, text=True, timeout=900, check=False
    )
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    if not lines:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    found: dict[str, list[float]] = json.loads(lines[0])
    first = found["torchrec"]
    rows = [
        [
            name,
            f"{statistics.median(times):.1f}",
            f"{min(times):.1f}-{max(times):.1f}",
            f"{statistics.median(a / b for a, b in zip(times, first, strict=True)):.2f}",
        ]
        for name, times in found.items()
    ]
    caption = f"26 tables x {options.rows:,} x 16, 2 ranks, {options.batch} examples each; {options.rounds} rounds"
    print(Table(["", "ms a step", "rounds", "x torchrec"], rows, caption).markdown())


if __name__ == "__main__":
    main()
