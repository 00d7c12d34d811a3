"""`hvd.SyncBatchNorm` on CPUs is torch's BatchNorm of all ranks' examples together (patch 87)."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from torch import Tensor, nn

from tests.support.worlds import on_ranks

COUNTS = (1, 4, 3)  # examples of each rank


def make_pair(ndim: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """hvd.SyncBatchNorm of 5 channels and torch's BatchNorm, with the same weights and statistics, not 0 and 1."""
    ours = hvd.SyncBatchNorm(5, **options)
    reference = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[ndim](5, **options)
    for number, t in enumerate(reference.state_dict().values()):
        if t.is_floating_point():
            t.copy_(torch.rand(5, generator=torch.Generator().manual_seed(number)) + 0.5)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def draw_parts(step: int, ndim: int, counts: tuple[int, ...]) -> list[Tensor]:
    """Each rank's examples, whose mean is far from 0 compared to their spread."""
    shape = (3, 2, 4)[: ndim - 2]
    generator = torch.Generator().manual_seed(step)
    return [3 + torch.randn(count, 5, *shape, generator=generator) for count in counts[: hvd.size()]]


def compare(ours: nn.Module, reference: nn.Module, ndim: int, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    """Check three steps forward and backward, and the statistics after them."""
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.04}
    buffers = dict(ours.named_buffers())
    for step in range(3):
        parts = [part.to(dtype) for part in draw_parts(step, ndim, counts)]
        whole = torch.cat(parts).float().requires_grad_()
        mine = parts[hvd.rank()].clone().requires_grad_()
        weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(9)) for part in parts]
        expected, found = reference(whole), ours(mine)
        assert found.dtype == dtype and found.shape == mine.shape
        (expected * torch.cat(weights)).sum().backward()
        (found.float() * weights[hvd.rank()]).sum().backward()
        part = slice(sum(counts[: hvd.rank()]), sum(counts[: hvd.rank() + 1]))
        torch.testing.assert_close(found.float(), expected[part], **close)
        torch.testing.assert_close(mine.grad.float(), whole.grad[part], **close)
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        if q.requires_grad:
            total = hvd.allreduce(p.grad.float(), op=hvd.Sum, name="sync_batch_norm.parameter")
            torch.testing.assert_close(total, q.grad, rtol=1e-4 if dtype == torch.float32 else 0.02, atol=0.1)
        else:
            assert p.grad is None
    for name, buffer in ours.named_buffers():
        assert buffer is buffers[name], f"{name} was rebound"
        torch.testing.assert_close(buffer, reference.get_buffer(name))


OPTIONS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "statistics of the batch only": {"track_running_stats": False},
    "without weights": {"affine": False},
}


@on_ranks(2, 3)
def test_it_is_batch_norm_of_all_examples() -> None:
    for options in OPTIONS.values():
        for ndim in (2, 3, 4, 5):
            compare(*make_pair(ndim, **options), ndim, torch.float32, COUNTS)
    compare(*make_pair(4), 4, torch.float32, (0, 2, 1))
    for dtype in (torch.bfloat16, torch.float16):
        compare(*make_pair(4), 4, dtype, COUNTS)


@on_ranks(2)
def test_modes_in_which_nothing_is_exchanged_or_learned() -> None:
    ours, reference = make_pair(4)
    for module in (ours, reference):
        module.eval()
    with torch.no_grad():  # evaluation exchanges nothing: one rank alone can do it
        if hvd.rank() == 0:
            batch = draw_parts(0, 4, COUNTS)[0]
            torch.testing.assert_close(ours(batch), reference(batch))
    compare(ours, reference, 4, torch.float32, COUNTS)
    ours, reference = make_pair(4)
    for p in (*ours.parameters(), *reference.parameters()):
        p.requires_grad_(False)
    compare(ours, reference, 4, torch.float32, COUNTS)
    ours, reference = make_pair(2, track_running_stats=False)
    for module in (ours, reference):
        module.eval()
    compare(ours, reference, 2, torch.float32, COUNTS)
    ours.train()
    with pytest.raises(ValueError, match="more than 1 value per channel on all ranks together"):
        ours(draw_parts(0, 2, (1, 0))[hvd.rank()])
    view = torch.zeros(5, 4)[:, 0]
    ours = hvd.SyncBatchNorm(5)
    ours.running_mean = view  # a view into a flat tensor, as an exchange of buffers has
    ours(draw_parts(0, 4, COUNTS)[hvd.rank()])
    assert ours.running_mean is view and view.abs().sum() > 0
    half = hvd.SyncBatchNorm(5).bfloat16()
    assert half(draw_parts(0, 4, COUNTS)[hvd.rank()].bfloat16()).dtype == torch.bfloat16
    assert half.running_mean.dtype == torch.bfloat16
