"""`all_gather` and `all_reduce` for a recipe's `score`: a loss over the examples of all ranks, with the right gradient.

With L_r the sum of rank r's losses, a step follows the gradient of L = L_0 + L_1 + ... :

    all_gather    y = [x_0; x_1; ...] on every rank     dL/dx_r = rows of rank r of  sum over ranks q of dL_q/dy
    all_reduce    y = x_0 + x_1 + ... on every rank     dL/dx_r =                    sum over ranks q of dL_q/dy

(Horovod's own functions take the mean over q, which belongs to a loss that is averaged over ranks; their gradient in a
`score` is that of one rank's result divided by the number of ranks.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hvdtrain.system.errors import UserError
from hvdtrain.torch.score_session import Call, get_session

OWN_ROWS = "_hvdtrain_own_rows"  # attribute of what was gathered


def all_gather(x: Tensor) -> Tensor:
    """Return the rows of all ranks, in the order of the global batch, to be called in `score`.

    Gradients flow back to the rank that a row is from. Ranks may have different numbers of rows; a rank without
    examples in a step takes part with none. A step is one pass then: `--micro-batch` is refused.

    Args:
        x: (B, ...) with as many rows as the batch has examples, or a fixed multiple of it; of one type and one trailing
            shape on all ranks.

    Returns:
        (N, ...), N being the sum of B over ranks. `own_rows` finds the rows of this rank in it. On one rank it is x.

    Raises:
        UserError: x is a scalar or not a tensor, or the call differs from those of the trial.

    Example:
        The contrastive loss of CLIP (Radford et al., 2021), over the pairs of all ranks:

            images, texts = model(batch)                                          # (B, d) each
            all_images, all_texts = all_gather(images), all_gather(texts)         # (N, d)
            own = torch.arange(len(all_texts))[own_rows(all_texts)]               # (B,)
            loss = (F.cross_entropy(images @ all_texts.T, own, reduction="none")
                    + F.cross_entropy(texts @ all_images.T, own, reduction="none")) / 2
    """
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise UserError(f"all_gather needs a tensor of shape (B, ...), got {describe_argument(x)}")
    session = get_session()
    call = session.start_call("all_gather", x, x.shape[1:])
    if call.is_alone and not session.is_recording:
        gathered, rows = x.view_as(x), slice(0, len(x))
    elif torch.is_grad_enabled() and x.requires_grad:
        gathered, token, rows = _AllGather.apply(x, call)
        session.tie(token)
    else:
        gathered, rows = call.gather_examples(x)
    setattr(gathered, OWN_ROWS, rows)
    return gathered


def own_rows(gathered: Tensor) -> slice:
    """Return which rows of a result of `all_gather` are this rank's.

    Raises UserError for any other tensor.
    """
    rows = getattr(gathered, OWN_ROWS, None)
    if not isinstance(rows, slice):
        raise UserError("own_rows needs the tensor that all_gather has returned, itself")
    return rows


def all_reduce(x: Tensor) -> Tensor:
    """Return the sum over ranks of a tensor, to be called in `score`; a rank without examples counts as zeros.

    Gradients are those of the sum of all ranks' losses. 16-bit floats are summed in float32. A step is one pass then:
    `--micro-batch` is refused.

    Args:
        x: of one type and one shape on all ranks, which does not depend on the number of examples: a sum over them.

    Raises:
        UserError: x is not a tensor, or the call differs from those of the trial.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"all_reduce needs a tensor, got {describe_argument(x)}")
    session = get_session()
    call = session.start_call("all_reduce", x, x.shape)
    if call.is_alone and not session.is_recording:
        return x.view_as(x)
    if torch.is_grad_enabled() and x.requires_grad:
        total, token = _AllReduce.apply(x, call)
        session.tie(token)
        return total  # type: ignore[no-any-return]
    return call.sum(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call) -> tuple[Tensor, Tensor, slice]:
        gathered, rows = call.gather_examples(x)
        ctx.call, ctx.rows = call, rows
        return gathered, x.new_zeros(()), rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:
        return ctx.call.sum(gradient, ".gradient", rows_of_gather=True)[ctx.rows], None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        ctx.call = call
        return call.sum(x), x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return ctx.call.sum(gradient, ".gradient"), None


def describe_argument(value: object) -> str:
    """Return what a function was called with, for an error."""
    return "a scalar tensor" if isinstance(value, Tensor) else type(value).__name__
