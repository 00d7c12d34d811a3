"""`hvdtrain.diagnose`: how often a rank that was made slow is named, with the right cause, and what a step costs.

    python -m tests.benchmarks.diagnose_named [--runs 25] [--seed N] [--json FILE]

Four ranks of a torch DDP program (Gloo), each on a host of its own (needs root), share this machine's cores. A rank
drawn by chance is made slow: 0.2 s more in each backward, or in its loader; a core of which it gets a
tenth (by a control group's quota, or stopped again and again, as cpulimit does it); a link of 25 Mbit/s. Nobody is made
slow in as many runs again. The cost is of one rank without others, with and without, in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.tables import Table, publish
from tests.hosts.cluster import cluster

RANKS = 4
CAUSES = {"backward": "compute", "loader": "data", "core": "core", "link": "link", "none": None}
Turn = tuple[str, int, int]  # what is planted, on which rank, which variant of it


def draw_turns(runs: int, seed: int) -> list[Turn]:
    """The given number of each kind, in a random order."""
    draw = random.Random(seed)
    turns = [(kind, draw.randrange(RANKS), number % 2) for kind in CAUSES for number in range(runs)]
    draw.shuffle(turns)
    return turns


def diagnose_turns(turns: Sequence[Turn]) -> list[tuple[int, str] | None]:
    """Whom diagnose.json names at the end of each turn, and the cause."""
    with tempfile.TemporaryDirectory() as name, cluster(RANKS) as hosts:
        folder = Path(name)
        (folder / "plan.json").write_text(json.dumps(turns))
        command = [sys.executable, "-m", "tests.benchmarks.diagnose_rank", str(folder / "plan.json"), name]
        common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29511"}
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        ranks = [host.popen(command, common | {"RANK": str(rank)}) for rank, host in enumerate(hosts)]
        exit_codes = [rank.wait(60 + 20 * len(turns)) for rank in ranks]
        if any(exit_codes):
            raise SystemExit("a rank failed")
        found = [json.loads((folder / f"{number}.json").read_text()) for number in range(len(turns))]
    stragglers = [one["end"] and one["end"]["straggler"] for one in found]
    return [one and (one["rank"], one["cause"]) for one in stragglers]


def measure_cost(layers: int, rounds: int = 15, steps: int = 40) -> tuple[float, float]:
    """Seconds of a step without, and how many more with `hvdtrain.diagnose`; medians over turns."""
    import torch
    from torch import nn

    import hvdtrain

    class Wide(nn.Module):
        """Layers next to each other: one after the other, their values would vanish."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.stack([layer(batch) for layer in self.layers]).sum()

    torch.set_num_threads(1)
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    loader = torch.utils.data.DataLoader(torch.randn(16 * steps, 64), 16)  # type: ignore[arg-type]

    def time_steps() -> float:
        seconds = []
        begin = time.perf_counter()
        for batch in loader:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
        return statistics.median(seconds[3:])

    with tempfile.TemporaryDirectory() as folder:
        pairs = []
        for _ in range(rounds):
            without = time_steps()
            with hvdtrain.diagnose(model, optimizer, path=Path(folder) / "diagnose.json"):
                pairs.append((without, time_steps() - without))
    return statistics.median(one for one, _ in pairs), statistics.median(more for _, more in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    turns = draw_turns(options.runs, options.seed)
    named = diagnose_turns(turns) if turns else []
    rows = []
    for kind, cause in CAUSES.items():
        results = [(turn, who) for turn, who in zip(turns, named, strict=True) if turn[0] == kind]
        right = [who == (cause and (turn[1], cause)) for turn, who in results]
        wrong = "; ".join(f"{turn}: {who}" for (turn, who), good in zip(results, right, strict=True) if not good)
        rows.append([kind, cause or "nobody", f"{sum(right)} of {len(right)}", wrong or "-"])
    costs = []
    for layers in (2, 20, 200):
        step, more = measure_cost(layers)
        costs.append([str(2 * layers), f"{step * 1e6:.0f}", f"{more * 1e6:.0f}", f"{more / step:.1%}"])
    caption = "Named at the end, of 4 ranks of a DDP program with one of them made slow:"
    publish(
        options.json,
        [
            Table(["made slow", "expected", "named right", "else"], rows, caption),
            Table(["parameters", "step, us", "more with it, us", "share"], costs, "Cost of a step, one rank:"),
        ],
    )


if __name__ == "__main__":
    main()
