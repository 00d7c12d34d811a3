"""`hvdtrain.fit` again and again in one process, on one rank and on several: nothing of one run reaches the next."""

from __future__ import annotations

import gc
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.exchange.hooks import GradientHooks
from hvdtrain.system.errors import KnownError, RecipeError
from hvdtrain.training.fit import fit, lone_failures
from tests.ranks.exact_recipe import Exact
from tests.support.limits import stretch
from tests.support.worlds import on_ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
SETTINGS = (
    {"compression": "topk:0.5,warmup=0,min=1"},
    {"deterministic": True},
    {"compression": "powersgd:2,warmup=0,min=1", "micro_batch": 2, "amp": "bf16"},
    {"exchange": "horovod"},
)


@dataclass(kw_only=True)
class Kept(Exact):
    """A recipe whose model is the caller's, and outlives a run."""

    kept: ClassVar[nn.Module]
    fails_at: int = -1

    def model(self) -> nn.Module:
        return self.kept

    def score(self, model, batch):
        if self.fails_at == self.now.step:
            raise ValueError("planted")
        return Exact.score(self, model, batch)


def describe_process() -> tuple[object, ...]:
    """What a run may leave behind; its threads get some seconds to end."""
    from horovod.torch.mpi_ops import _basics

    gc.collect()
    until = time.monotonic() + stretch(10)
    while any(thread.name.startswith("hvdtrain") for thread in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.05)
    names = sorted(thread.name for thread in threading.enumerate())
    handlers = [signal.getsignal(number) for number in SIGNALS]
    return names, handlers, len(GradientHooks._open_exchanges), len(_basics._get_process_set_ids_and_ranks())


def train(folder: Path, recipe: Exact | None = None, **options: object) -> dict[str, object]:
    recipe = recipe or Exact()
    summary = fit(recipe, run_dir=folder, steps=4, quiet=True, eval_every=4, logger=(), **options)
    assert summary["steps"] == 4
    return {name: summary[name] for name in ("train_loss", "eval", "world_size", "compression")}


@pytest.mark.slow
@on_ranks(1, 2, timeout=100)
def test_fit_is_the_same_after_other_runs_and_leaves_nothing(tmp_path):
    torch.set_num_threads(1)
    first = train(tmp_path / "first")
    before = describe_process()
    for number, options in enumerate(SETTINGS):
        train(tmp_path / f"other-{number}", **options)
    assert train(tmp_path / "again") == first
    Kept.kept = kept = Exact().model()
    assert train(tmp_path / "kept", Kept()) == first
    assert not kept.weight._post_accumulate_grad_hooks
    changed = kept.weight.detach().clone()
    train(tmp_path / "continued", Kept())  # with the same model, which continues from where it is
    assert not torch.equal(kept.weight, changed)
    alone = collectives.size() == 1
    for number, bad in enumerate((Exact(lr=1e300), Exact(schedule="nonsense"), *([Kept(fails_at=2)] * alone))):
        with pytest.raises((KnownError, ValueError)):
            train(tmp_path / f"bad-{number}", bad)
        assert train(tmp_path / f"after-{number}") == first
    with pytest.raises(hvdtrain.UserError, match="already holds a run"):
        train(tmp_path / "first")
    assert train(tmp_path / "last") == first
    assert describe_process() == before
    if not alone:  # on all ranks, each of which takes it for its own alone
        with pytest.raises(RecipeError, match="planted"):
            train(tmp_path / "planted", Kept(fails_at=2))
        with pytest.raises(hvdtrain.RunError, match=r"failed on this rank alone \(Kept.score\(\) raised .*: end this"):
            train(tmp_path / "refused")
        lone_failures.clear()
    collectives.barrier("test.end")
