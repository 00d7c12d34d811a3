"""`hvdtrain.torch.ddp_hook`: compression in torch's DistributedDataParallel, over Gloo."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from hvdtrain.torch import ddp_hook
from hvdtrain.torch.communication_hook import DdpHook
from tests.support.limits import stretch
from tests.support.worlds import on_ranks

SPECS = ["none", "fp16", "bf16", "int8", "qsgd:4bit", "onebit", "topk:0.1", "randomk:0.5", "powersgd:2"]
REMEMBERING = ["int8,feedback=on", "onebit", "topk:0.1", "powersgd:2"]  # one for each kind of collective
SHAPES = {"a": (30, 20), "b": (50,), "c": (20, 40), "d": (2, 3, 4), "e": (60, 10)}


@contextlib.contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """torch.distributed over the ranks of the kept world."""
    rank, size = collectives.rank(), collectives.size()
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Weights(nn.Module):
    """Parameters whose gradients are what the model is called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([(self.get_parameter(name) * x).sum() for name, x in gradients.items()]).sum()


def share(step: int, rank: int, names: Sequence[str] = tuple(SHAPES), **kind: Any) -> dict[str, torch.Tensor]:
    """The gradients of a rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {name: torch.randn(SHAPES[name], generator=generator, **kind) for name in names}


def hooked(spec: str, model: nn.Module | None = None, **options: Any) -> tuple[DistributedDataParallel, DdpHook]:
    # Buckets of a few kilobytes, so that there are several.
    parallel = DistributedDataParallel(Weights() if model is None else model, bucket_cap_mb=0.003, **options)
    hook = ddp_hook(spec if spec == "none" else f"{spec},min=64,warmup=0")
    hook.register(parallel)
    return parallel, hook


class Account:
    """What the ranks have applied and have not sent yet, against what they should have."""

    def __init__(self) -> None:
        self.expected = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def add(self, model: DistributedDataParallel, shares: Sequence[dict[str, torch.Tensor]]) -> None:
        """Enter all ranks' gradients of a step, and the sum that was applied."""
        for name, gradient in self.gradients(model).items():
            self.expected[name] += sum(own[name].double() for own in shares if name in own)
            self.expected[name] -= gradient.double() * dist.get_world_size(model.process_group)

    def gradients(self, model: DistributedDataParallel) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}

    def check(self, hook: DdpHook) -> None:
        unsent = hook.state_dict()["debts"]
        for name, expected in self.expected.items():
            found = unsent.get(f"{name}.residual", torch.zeros(expected.numel()))
            torch.testing.assert_close(found.double(), expected.flatten(), rtol=0, atol=1e-4)


def run_steps(model: DistributedDataParallel, account: Account, steps: range) -> None:
    group = model.process_group
    for step in steps:
        model.zero_grad()
        model(share(step, group.rank())).backward()
        account.add(model, [share(step, rank) for rank in range(group.size())])


def assert_same_on_all(model: nn.Module) -> None:
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    for other in collectives.wait(collectives.all_gather_async(own, "checks.weights")).view(-1, len(own)):
        assert torch.equal(other, own)


@on_ranks(2, 3)
def test_replicas_are_bit_identical_with_every_method(tmp_path: Path) -> None:
    with process_group(tmp_path):
        for spec in SPECS:
            for options in ({"gradient_as_bucket_view": True}, {"static_graph": True}):
                model, hook = hooked(spec, **options)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
                for step in range(4):
                    optimizer.zero_grad()
                    model(share(step, dist.get_rank())).backward()
                    optimizer.step()
                assert_same_on_all(model)
                assert model.module.a.count_nonzero() and model.module.b.count_nonzero(), spec
                assert hook.wire_bytes > 0


@on_ranks(2)
def test_the_mean_is_that_of_ddp_in_every_type(tmp_path: Path) -> None:
    with process_group(tmp_path):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            plain = DistributedDataParallel(Weights(dtype))
            model, _ = hooked("none", Weights(dtype))
            for step in range(2):
                for each in (plain, model):
                    each.zero_grad()
                    each(share(step, dist.get_rank(), dtype=dtype)).backward()
                for p, own in zip(plain.parameters(), model.parameters(), strict=True):
                    torch.testing.assert_close(own.grad, p.grad)


@on_ranks(2)
def test_what_a_step_does_not_send_is_sent_later(tmp_path: Path) -> None:
    """Through DDP's rebuilt buckets too."""
    with process_group(tmp_path):
        for spec in REMEMBERING:
            model, hook = hooked(spec)
            account = Account()
            run_steps(model, account, range(4))
            account.check(hook)
            assert hook.state_dict()["steps"] == 4


@on_ranks(3)
def test_a_resume_on_fewer_ranks_keeps_the_sum_of_residuals(tmp_path: Path) -> None:
    with process_group(tmp_path):
        pair = dist.new_group([0, 1])
        for spec in REMEMBERING:
            model, hook = hooked(spec)
            account = Account()
            run_steps(model, account, range(3))
            file = io.BytesIO()
            torch.save(hook.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            if dist.get_rank() == 2:
                continue
            model, hook = hooked(spec, process_group=pair)
            hook.load_state_dict(saved)
            assert hook.state_dict()["debts"] is not None and hook.state_dict()["steps"] == 3
            run_steps(model, account, range(3, 5))
            account.check(hook)


@on_ranks(2)
def test_unused_parameters_keep_what_they_have_not_sent(tmp_path: Path) -> None:
    with process_group(tmp_path):
        for spec in REMEMBERING:
            model, hook = hooked(spec, find_unused_parameters=True)
            account = Account()
            used = [[["a", "b", "c", "d", "e"]] * 2, [["a", "b", "e"]] * 2, [["a", "c"], ["a", "d"]], [["e"]] * 2]
            for step, names in enumerate(used):
                model.zero_grad()
                model(share(step, dist.get_rank(), names[dist.get_rank()])).backward()
                assert set(account.gradients(model)) == {*names[0], *names[1]}
                account.add(model, [share(step, rank, names[rank]) for rank in range(2)])
            account.check(hook)


@on_ranks(2)
def test_gradients_that_no_sync_accumulates_are_exchanged_once(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model, hook = hooked("topk:0.1", gradient_as_bucket_view=True)
        account = Account()
        for step in range(3):
            model.zero_grad()
            with model.no_sync():
                model(share(step, dist.get_rank())).backward()
            model(share(step, dist.get_rank())).backward()
            account.add(model, [share(step, rank) for rank in (0, 0, 1, 1)])
        account.check(hook)
        assert hook.state_dict()["steps"] == 3


@on_ranks(2)
def test_ranks_may_join_with_fewer_batches(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model, hook = hooked("int8,feedback=on")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with model.join():
            for step in range(2 + 2 * dist.get_rank()):
                optimizer.zero_grad()
                model(share(step, dist.get_rank())).backward()
                optimizer.step()
        assert_same_on_all(model)
        assert hook.state_dict()["steps"] == 4
        refused = pytest.raises(UserError, match="divide_by_initial_world_size=True")
        with model.join(divide_by_initial_world_size=False), refused:
            model(share(0, 0)).backward()


@on_ranks(2)
def test_nothing_is_kept_of_a_step_that_is_not_finite(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model, hook = hooked("powersgd:2")
        account = Account()
        run_steps(model, account, range(2))
        model.zero_grad()
        bad = share(2, dist.get_rank())
        if dist.get_rank() == 1:
            bad["c"][3, 4] = torch.inf
        model(bad).backward()
        assert not model.module.c.grad.isfinite().all()
        account.check(hook)


@on_ranks(2)
def test_what_is_not_sent_follows_the_loss_scale(tmp_path: Path) -> None:
    with process_group(tmp_path):
        model = DistributedDataParallel(Weights())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        hook = ddp_hook("topk:0.1,min=64,warmup=0", grad_scaler=scaler)
        model.register_comm_hook(hook, hook.callback)
        account = Account()
        for step, scale in enumerate((4.0, 4.0, 8.0)):
            scaler.update(scale)
            model.zero_grad()
            scaler.scale(model(share(step, dist.get_rank()))).backward()
            for p in model.parameters():
                p.grad /= scale
            account.add(model, [share(step, rank) for rank in range(2)])
        account.expected = {name: scale * total for name, total in account.expected.items()}
        account.check(hook)
        assert hook.state_dict()["loss_scale"] == scale


@on_ranks(1)
def test_what_the_hook_cannot_do_it_refuses_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no compression 'auto'"):
        ddp_hook("auto")
    with pytest.raises(UserError, match="'nonsense' is not a method"):
        ddp_hook("nonsense")
    with pytest.raises(UserError, match="not a Linear: wrap the model"):
        ddp_hook("int8").register(nn.Linear(2, 2))
    with pytest.raises(UserError, match="not a state of ddp_hook: it has no 'steps'"):
        ddp_hook("int8").load_state_dict({})
    with process_group(tmp_path):
        sparse = DistributedDataParallel(nn.Sequential(nn.Embedding(3, 4, sparse=True)))
        with pytest.raises(UserError, match=r"no sparse gradients, as 0\.weight has"):
            ddp_hook("int8").register(sparse)
        with pytest.raises(UserError, match="no parameter or module 'x'"):
            ddp_hook("int8,layer.x=none").register(DistributedDataParallel(Weights()))
        with pytest.raises(UserError, match="no complex parameters, as a is"):
            ddp_hook("int8").register(DistributedDataParallel(Weights(torch.complex64)))
        model, hook = hooked("topk:0.1")
        with pytest.raises(UserError, match="registered already"):
            hook.register(DistributedDataParallel(Weights()))
        model(share(0, 0)).backward()
        other = ddp_hook("topk:0.1")
        other.register(DistributedDataParallel(nn.Linear(2, 2)))
        with pytest.raises(UserError, match=r"600 values of a, of which this model trains 0"):
            other.load_state_dict(hook.state_dict())


WITHOUT_HOROVOD = """
import sys
sys.modules["horovod"] = None
import torch
import torch.distributed as dist
import hvdtrain
import hvdtrain.torch
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(100, 100))
hook = hvdtrain.torch.ddp_hook("powersgd:4,warmup=0")
hook.register(model)
model(torch.ones(1, 100)).sum().backward()
hook.load_state_dict(hook.state_dict())
assert not [name for name in sys.modules if name.startswith("horovod.")]
dist.destroy_process_group()
"""


def test_it_needs_no_horovod(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_HOROVOD, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=stretch(120))
    assert done.returncode == 0, done.stderr
