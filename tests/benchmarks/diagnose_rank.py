"""One rank of a torch DDP program in which ranks are made slow, one after the other, under `hvdtrain.diagnose`.

    python -m tests.benchmarks.diagnose_rank PLAN.json FOLDER

PLAN.json lists [kind, rank, variant]; FOLDER gets a diagnose.json of each, NUMBER.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import hvdtrain
from tests.support.cpu import core_quota

WIDTH, BATCH = 300, 96
PLANTED = 0.2  # seconds in backward or in the loader
STEPS = {"backward": 12, "loader": 12, "core": 30, "link": 12, "none": 40}
LINK_RATE = "25mbit"  # 560 kB of gradients take about 0.2 s
CORE_SHARE = 0.1  # that a throttled core leaves


class Noise(Dataset[torch.Tensor]):
    """Inputs, some of which take long to load."""

    def __init__(self, length: int, seconds: float) -> None:
        self.length, self.seconds = length, seconds
        self.items = torch.randn(BATCH, WIDTH)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.seconds and index % BATCH == 0:
            time.sleep(self.seconds)
        return self.items[index % BATCH]


@contextlib.contextmanager
def throttled_core(variant: int) -> Iterator[None]:
    """Leave this process a part of a core: by a control group's quota, or stopped again and again as cpulimit does."""
    own = os.getpid()
    if variant == 0:
        with core_quota(CORE_SHARE, f"diagnose-{own}") as processes:
            processes.write_text(str(own))
            yield
        return
    script = "import os, signal, sys, time\nwhile os.getppid() == int(sys.argv[1]):\n"
    for name, seconds in (("SIGSTOP", 0.1 * (1 - CORE_SHARE)), ("SIGCONT", 0.1 * CORE_SHARE)):
        script += f"    os.kill(int(sys.argv[1]), signal.{name}); time.sleep({seconds})\n"
    limiter = subprocess.Popen([sys.executable, "-S", "-E", "-c", script, str(own)])
    try:
        yield
    finally:
        limiter.send_signal(signal.SIGSTOP)
        os.kill(own, signal.SIGCONT)
        limiter.kill()
        limiter.wait()


@contextlib.contextmanager
def slow_link() -> Iterator[None]:
    """Limit the rate at which this host sends."""
    shape = ["tbf", "rate", LINK_RATE, "burst", "32kb", "latency", "50ms"]
    subprocess.run(["tc", "qdisc", "add", "dev", "eth0", "root", *shape], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "eth0", "root"], check=True)


def train(model: nn.Module, inner: nn.Module, kind: str, variant: int, path: Path) -> None:
    """Train for some steps with `kind` planted on this rank; "none" plants nothing, `kind` only gives the steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    planted, _, steps = kind.partition(":")
    batches = DataLoader(Noise(BATCH * STEPS[steps], PLANTED if planted == "loader" else 0.0), BATCH)
    with contextlib.ExitStack() as undo:
        if planted == "backward":
            last: Any = inner.get_submodule("2")
            undo.callback(last.register_full_backward_hook(lambda *_: time.sleep(PLANTED)).remove)
        if planted in ("core", "link"):
            undo.enter_context(throttled_core(variant) if planted == "core" else slow_link())
        with hvdtrain.diagnose(model, optimizer, path=path):
            for batch in batches:
                optimizer.zero_grad()
                model(batch.requires_grad_()).square().mean().backward()
                optimizer.step()


def main() -> None:
    plan, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    model = DistributedDataParallel(inner)
    for number, (kind, rank, variant) in enumerate(plan):
        dist.barrier()
        train(model, inner, f"{kind if rank == dist.get_rank() else 'none'}:{kind}", variant, folder / f"{number}.json")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
