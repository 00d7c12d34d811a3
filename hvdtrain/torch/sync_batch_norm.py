"""Batch norm over the examples of all ranks.

Each rank r has n_r values of a channel, their mean m_r and the sum S_r of their squared distances from it. One
all-gather brings these three to all ranks, which combine them without cancellation (Chan, Golub and LeVeque, 1983):

    n = sum n_r        m = sum n_r m_r / n        S = sum S_r + sum n_r (m_r - m)^2        variance = S / n

Backward, with x^ = (x - m) / s, s = sqrt(variance + eps), y = w x^ + b, and one all-reduce of the two sums over all n:

    dL/dx = w / s * (dL/dy - (sum dL/dy + x^ * sum dL/dy x^) / n)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from hvdtrain.system.errors import UserError
from hvdtrain.torch.score_session import Call, get_session

LAZY_CLASSES = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
CONVERTED_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose statistics in training are those of the whole batch, over all ranks (CPU and GPU).

    It gives what `torch.nn.BatchNorm1d`, 2d or 3d gives on one rank, in outputs, gradients and running statistics, also
    if ranks have different numbers of examples or none. It takes the same arguments, has the same parameters and
    buffers, and takes inputs (B, C, ...). What checkpointing computes again does not move the running statistics. A
    step is one pass then: `--micro-batch` is refused, and `--deterministic`.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """Make every BatchNorm1d, 2d, 3d and torch.nn.SyncBatchNorm of a module, itself included, a SyncBatchNorm.

        In place: the layers keep their parameters, buffers, hooks and settings. Returns the module.

        Raises UserError for a layer of a class derived from these, whose forward may be another one.
        """
        for name, layer in module.named_modules():
            if type(layer) in CONVERTED_CLASSES:
                layer.__class__ = cls
            elif type(layer) in LAZY_CLASSES:
                layer.cls_to_become = cls
            elif isinstance(layer, _BatchNorm) and not isinstance(layer, cls):
                raise UserError(
                    f"{name!r} is a {type(layer).__name__}, which cannot be converted to SyncBatchNorm; expected "
                    "BatchNorm1d, 2d or 3d: replace it, or convert the other layers yourself"
                )
        return module

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm needs an input (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (B, C, ...)."""
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return super().forward(input)
        call = get_session().start_call("SyncBatchNorm", input, (self.num_features,))
        updates = self.training and self.track_running_stats and not call.session.in_backward
        if call.is_alone and not call.session.is_recording:
            if updates or self.running_mean is None or self.running_var is None:
                return super().forward(input)
            copies = self.running_mean.clone(), self.running_var.clone()
            return F.batch_norm(input, *copies, self.weight, self.bias, True, 0.0, self.eps)
        output, mean, variance, count, token = _Normalize.apply(input, self.weight, self.bias, self.eps, call)
        if updates:
            self._update_running_statistics(mean, variance, count)
        if output.requires_grad:
            call.session.tie(token)
        return output  # type: ignore[no-any-return]

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: float) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        for running, value in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
            running.copy_((1 - factor) * running + factor * value)


def exclude_from_compiler() -> None:
    """Let torch.compile leave SyncBatchNorm as it is, which waits for other ranks; from now on in this process."""
    if not hasattr(SyncBatchNorm.forward, "_torchdynamo_disable"):
        SyncBatchNorm.forward = torch.compiler.disable(SyncBatchNorm.forward)  # type: ignore[method-assign, no-untyped-call]


class _Normalize(torch.autograd.Function):
    """(B, C, ...) -> its normalization, mean (C,), variance (C,), number of values in a channel, a token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, call: Call
    ) -> tuple[Tensor, Tensor, Tensor, float, Tensor]:
        mean, variance, count = gather_moments(x, call)
        if count == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)} over all ranks"
            )
        dtype = _accumulation_dtype(x)
        weight_used, bias_used = (None if p is None else p.to(dtype) for p in (weight, bias))
        output = F.batch_norm(x, mean.to(dtype), variance.to(dtype), weight_used, bias_used, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.call, ctx.count, ctx.has_bias = call, count, bias is not None
        ctx.mark_non_differentiable(mean, variance)
        return output, mean, variance, count, mean.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        dtype, dims = _accumulation_dtype(x), [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        gradient, centered = gradient.to(dtype), x.to(dtype) - mean.to(dtype).view(shape)
        bias_gradient = gradient.sum(dims)
        weight_gradient = (gradient * centered).sum(dims) * inverse_std.to(dtype)
        totals = ctx.call.sum(torch.stack([bias_gradient, weight_gradient]).double(), ".gradient") / ctx.count
        scale = inverse_std if weight is None else inverse_std * weight
        offset, slope = totals[0] * scale, totals[1] * scale * inverse_std
        own = gradient * scale.to(dtype).view(shape)
        rest = centered.mul_(slope.to(dtype).view(shape)).add_(offset.to(dtype).view(shape))
        return (
            (own - rest).to(x.dtype),
            None if weight is None else weight_gradient.to(weight.dtype),
            bias_gradient.to(weight.dtype if weight is not None else dtype) if ctx.has_bias else None,
            None,
            None,
        )


def gather_moments(x: Tensor, call: Call) -> tuple[Tensor, Tensor, float]:
    """Return the mean and the variance of each channel over all ranks, (C,) float64, and the number of its values."""
    channels, dims = x.shape[1], [0, *range(2, x.dim())]
    count = x.numel() // channels
    own = torch.zeros((1, 1 + 2 * channels), dtype=torch.float64, device=x.device)
    if count:
        variance, mean = torch.var_mean(x.to(_accumulation_dtype(x)), dims, correction=0)
        own = torch.cat([own.new_full((1,), count), mean.double(), variance.double() * count])[None]
    counts, means, squares = torch.split(call.gather_rows(own), [1, channels, channels], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    variance = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / total
    return mean, variance, float(total)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
