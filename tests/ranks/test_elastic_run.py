"""Scripts of hvd.elastic.run, unchanged, under bare horovodrun, on the library as `hvdtrain horovod build` patches it.

tests/benchmarks/elastic_stock_faults.py has the script, all faults, and what published Horovod makes of them.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.benchmarks.elastic_runs import NAMES, listed
from tests.benchmarks.elastic_stock_faults import FAULTS, Fault, Stock, count_visits, have_same_weights, observe, start
from tests.support.worlds import KeptWorld

SURVIVED = [name for name in FAULTS if name not in ("kill-all", "driver", "bug", "disk-full")]


@pytest.mark.slow
def test_an_unchanged_script_survives_one_fault_after_the_other(tmp_path: Path) -> None:
    """On one host: newcomers that crash and that cannot be reached, then rank 0 is killed, and a host is added."""
    fault = Fault(lambda job: None, hosts=f"{NAMES[0]}:3")
    with start(tmp_path, fault, 100, None) as job:
        began = time.time()
        job.fault("init-crash")
        job.hosts(f"{fault.hosts} {NAMES[1]}:1 203.0.113.9:1")
        job.steps(4)
        assert job.sizes() == [3]
        job.fault("slow")  # so that those who join find it running
        job.hosts(f"{fault.hosts} {NAMES[2]}:1")
        job.kill(0)
        # Another worker is started for rank 0, or the host joins, or both.
        while not any(size >= 3 for size in job.sizes()[2:]):
            assert job.alive(), job.sizes()
            time.sleep(0.1)
        job.fault("")
        wait_for_end(job)
    assert job.job.process.returncode == 0, (tmp_path / "output").read_text()
    counted = count_visits(job.rows(), began, finished=True)
    assert (counted["lost"], counted["repeated"]) == (0, 0), counted
    assert job.sizes()[:2] == [3, 2], job.sizes()
    assert have_same_weights(tmp_path)


def wait_for_end(job: Stock) -> None:
    while job.alive():
        time.sleep(0.05)


def test_all_take_over_the_state_of_the_rank_that_has_committed_most(world2: KeptWorld) -> None:
    """A newcomer can be rank 0. Also of an optimizer and a schedule, and of tensors of any type and layout."""
    found = world2.run(synchronize)
    assert found[0] == found[1]
    assert found[0]["trained by"] == 1
    assert found[0]["last epoch"] == 3


def synchronize() -> dict[str, object]:
    import horovod.torch as hvd

    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    model.register_buffer("table", torch.randn(3).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (hvd.rank() + 1), weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, schedule=schedule, who=hvd.rank(), seen=[])
    if hvd.rank() == 1:
        for _ in range(3):
            model(torch.randn(2, 3, 5, 5)).square().sum().backward()
            optimizer.step()
            schedule.step()
        state.save()
    state.sync()
    values = [*model.state_dict().values(), *(value for one in optimizer.state.values() for value in one.values())]
    return {
        "trained by": state.who,
        "last epoch": schedule.last_epoch,
        "rate": optimizer.param_groups[0]["lr"],
        "values": [value.double().sum().item() for value in values],
    }


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SURVIVED)
def test_an_unchanged_script_survives_each_fault(name: str) -> None:
    found = observe(name, 120, None)
    assert (found["outcome"], found["lost"], found["repeated"]) == ("finished", 0, 0), found
    assert found["same weights"], found
    assert found["left"] == 0, found
    if name.startswith(("newcomer-", "unreachable", "discovery-")) and name not in (
        "discovery-hangs",
        "discovery-flaps",
    ):
        assert found["worlds"] == [3], found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_all_hosts_are_replaced(tmp_path: Path) -> None:
    with start(tmp_path, FAULTS["none"], 120, None) as job:
        job.hosts(" ".join(f"{name}:1" for name in NAMES[3:6]))
        wait_for_end(job)
    counted = count_visits(job.rows(), time.time(), finished=True)
    assert job.job.process.returncode == 0
    assert (counted["lost"], counted["repeated"]) == (0, 0), counted
    assert have_same_weights(tmp_path)
    assert listed(3) not in (tmp_path / "hosts").read_text()
