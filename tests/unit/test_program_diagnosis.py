"""`hvdtrain.diagnose` in one process: loops of all kinds are seen, and what is wrong is refused by name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import hvdtrain
from hvdtrain.comm.mailbox import choose_address, reject_unconnected_ranks

STEPS, PAUSE = 6, 0.02  # the first step of a loop is left out


class PausingLinear(nn.Linear):
    """A layer whose forward takes a while."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return super().forward(batch)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(PausingLinear(4, 4), nn.Linear(4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def read_medians(path: Path) -> dict[str, float]:
    found = json.loads(path.read_text())
    assert found["end"]["steps"] == found["last_step"] == STEPS - 1 and found["drift"] is None
    (seconds,) = found["end"]["seconds"]
    return dict(seconds)


def run_plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()


def run_accumulating(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(2):
            model(torch.randn(3, 4)).sum().backward()
        optimizer.step()


def run_closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As Lightning: forward and backward run within `step`."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(torch.randn(3, 4)).sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(STEPS):
        optimizer.step(closure)


def run_frozen(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(False)
    run_plain(model, optimizer)


def run_checkpointed(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        checkpoint(model, torch.randn(3, 4, requires_grad=True), use_reentrant=True).sum().backward()
        optimizer.step()


def run_part(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Of many parameters, few are hooked; those that get gradients are not."""
    model[0].weight.requires_grad_(False)
    run_plain(model, optimizer)


def run_own_optimizer(model: nn.Module, _: torch.optim.Optimizer) -> None:
    run_plain(model, torch.optim.AdamW(model.parameters()))


LOOPS: list[Callable[..., None]] = [run_plain, run_accumulating, run_closure, run_frozen, run_checkpointed, run_part]


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("named", [True, False], ids=["optimizer", "any"])
def test_the_compute_of_a_step_is_seen(loop: Callable[..., None], named: bool, tmp_path: Path) -> None:
    model, optimizer = build()
    other, first = nn.Linear(2, 2), next(iter(model.children()))
    first.spare = nn.ParameterList(torch.zeros(1) for _ in range(500 if loop is run_part else 0))
    with hvdtrain.diagnose(model, optimizer if named else None, path=tmp_path / "diagnose.json"):
        loop(model, optimizer)
        torch.optim.SGD(other.parameters(), lr=0.1).step()  # of another model: no step of this one
    medians = read_medians(tmp_path / "diagnose.json")
    assert medians["compute"] > PAUSE and medians["data"] == 0.0


def test_an_optimizer_made_within_is_found(tmp_path: Path) -> None:
    model, optimizer = build()
    with hvdtrain.diagnose(model, path=tmp_path / "diagnose.json"):
        run_own_optimizer(model, optimizer)
    assert read_medians(tmp_path / "diagnose.json")["compute"] > PAUSE


@pytest.mark.parametrize("own", [True, False], ids=["generator", "DataLoader"])
def test_the_wait_for_batches_is_seen(own: bool, tmp_path: Path) -> None:
    def generate() -> Iterator[torch.Tensor]:
        for _ in range(STEPS):
            time.sleep(PAUSE)
            yield torch.randn(3, 4)

    class Slow(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, index: int) -> torch.Tensor:
            time.sleep(PAUSE)
            return torch.randn(4)

    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hvdtrain.diagnose(model, optimizer, path=tmp_path / "diagnose.json") as diagnosis:
        for batch in diagnosis.time_batches(generate()) if own else DataLoader(Slow(), 1):
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
    medians = read_medians(tmp_path / "diagnose.json")
    assert medians["data"] > PAUSE  # nothing that is not seen as data is counted there


def test_steps_are_seen_after_one_that_raised(tmp_path: Path) -> None:
    model, optimizer = build()
    with hvdtrain.diagnose(model, optimizer, path=tmp_path / "diagnose.json") as diagnosis:
        for number, batch in enumerate(diagnosis.time_batches([torch.randn(3, 4)] * (STEPS + 1))):
            optimizer.zero_grad()
            model(batch).sum().backward()
            if number == 2:
                with pytest.raises(TypeError):
                    optimizer.step("not a closure")  # type: ignore[call-overload]
            else:
                optimizer.step()
    read_medians(tmp_path / "diagnose.json")


def test_one_rank_has_nothing_to_compare_with_and_all_is_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = build()
    before = [vars(torch.distributed.Work).copy(), vars(torch.nn.parallel.DistributedDataParallel).copy()]
    with hvdtrain.diagnose(model, optimizer, path=tmp_path / "diagnose.json"):
        run_plain(model, optimizer)
    assert "one rank: there is nothing to compare" in capsys.readouterr().out
    assert [vars(torch.distributed.Work), vars(torch.nn.parallel.DistributedDataParallel)] == before
    assert not model._forward_pre_hooks and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert "synchronize" not in vars(optimizer)


def test_no_step_and_an_error_are_no_trouble(tmp_path: Path) -> None:
    model, optimizer = build()
    with hvdtrain.diagnose(model, optimizer, path=tmp_path / "diagnose.json"):
        pass
    assert not (tmp_path / "diagnose.json").exists()
    with pytest.raises(ZeroDivisionError), hvdtrain.diagnose(model, optimizer, path=tmp_path / "diagnose.json"):
        run_plain(model, optimizer)
        raise ZeroDivisionError
    read_medians(tmp_path / "diagnose.json")


def test_what_is_wrong_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, optimizer = build()
    with pytest.raises(hvdtrain.UserError, match=r"expects a torch.nn.Module as its model, got list"):
        hvdtrain.diagnose([model])  # type: ignore[arg-type]
    with pytest.raises(hvdtrain.UserError, match=r"expects a torch.optim.Optimizer, or a list of them, got int"):
        hvdtrain.diagnose(model, [optimizer, 3])
    with pytest.raises(hvdtrain.UserError, match=r"expects a number of steps as checksum_every, 0 for never, got -1"):
        hvdtrain.diagnose(model, optimizer, checksum_every=-1)
    reject_unconnected_ranks({"WORLD_SIZE": "1"})
    expected = r"WORLD_SIZE is 2, but neither torch.distributed nor Horovod is initialized in this process: call "
    with pytest.raises(hvdtrain.UserError, match=expected):
        reject_unconnected_ranks({"WORLD_SIZE": "2"})


@pytest.mark.parametrize("name", ["HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME"])
def test_rank_0_listens_on_the_interface_of_the_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "lo")
    assert choose_address(None) == "127.0.0.1"
