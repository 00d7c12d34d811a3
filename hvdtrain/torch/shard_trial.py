"""How an optimizer may be divided among ranks: found out by trying a copy of it on small parameters.

    together                [ w . . . . . | b . . ]           one copy has all
    element-wise            [ w . . | b . ]  [ . . . | . ]    one copy a rank, each with its part of the values
    by whole parameters     [ w . . . . . ]  [ b . . ]        one copy a rank, each with some of the parameters

If the same gradients give the same bits after three steps, the optimizer may be divided so.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.comm import collectives
from hvdtrain.exchange.local_tensors import local_tensor
from hvdtrain.exchange.partition import ShardUnit
from hvdtrain.system.errors import UserError
from hvdtrain.torch.sandbox import preserve_random_state
from hvdtrain.torch.tensors import has_same_bits, is_writable_in_place

NUM_STEPS = 3
TRIAL_LR = 0.01  # which moves values visibly
# Of each axis of a parameter in the trial. Some optimizers treat matrices differently from some 128 rows on.
MOST_ROWS = 130
MOST_ALIKE = 2  # parameters of one group, shape and type that are tried
OPTIMIZER_FLAG = "--shard optimizer"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class DivisionTrial:
    """How an optimizer may be divided.

    Attributes:
        unit: what is not divided.
        state_bytes: of each parameter's value, as far as the state has the parameter's shape.
    """

    unit: ShardUnit
    state_bytes: float


def find_shard_unit(
    optimizer: torch.optim.Optimizer, recipe_name: str, model: nn.Module, flag: str = OPTIMIZER_FLAG
) -> DivisionTrial:
    """Return how the optimizer of a model may be divided, the same on all ranks, all of which call this.

    flag: the option that asks for it.

    Raises UserError on all ranks if it may not be divided at all.
    """
    with preserve_random_state():
        torch.manual_seed(0)
        collectives.on_all_ranks("shard.memory", lambda: check_memory(model, flag))
        own = collectives.on_all_ranks("shard.trial", lambda: try_units(optimizer, recipe_name, flag))
    found = collectives.gather_json([own.unit, own.state_bytes], "shard.unit")
    return DivisionTrial("parameters" if ["parameters"] in [row[:1] for row in found] else "elements", found[0][1])


def try_units(optimizer: torch.optim.Optimizer, recipe_name: str, flag: str = OPTIMIZER_FLAG) -> DivisionTrial:
    """Return how the optimizer may be divided, as far as this rank sees. Raises UserError if it may not be."""
    whose = f"{recipe_name}.optimizer: {type(optimizer).__name__}"
    if vars(optimizer).get("_optimizer_step_pre_hooks"):
        raise UserError(f"{whose} has a hook before its step, which would see parts of the gradients; leave out {flag}")
    params, shapes = _choose_shapes(optimizer)
    try:
        if (state_bytes := _try_elements(optimizer, params, shapes)) is not None:
            return DivisionTrial("elements", state_bytes)
    except Exception:  # of any optimizer: one that does not take flat parts may raise anything
        pass
    try:
        if _try_parameters(optimizer, params, shapes):
            return DivisionTrial("parameters", 0.0)
    except Exception as error:
        raise UserError(
            f"{whose} cannot be divided among ranks: with some of its parameters it raises {type(error).__name__}: "
            f"{error}; leave out {flag}"
        ) from error
    raise UserError(
        f"{whose} cannot be divided among ranks: what it does to a parameter depends on the others, or on random "
        f"numbers; leave out {flag}"
    )


def _choose_shapes(optimizer: torch.optim.Optimizer) -> tuple[list[nn.Parameter], list[Shape]]:
    """Return the optimizer's parameters, and the shapes that they have in the trial: (0,) for those not tried."""
    params, shapes, counts = [], [], Counter[object]()
    for number, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            shape = tuple(min(size, MOST_ROWS) for size in p.shape)
            kind = (number, shape, p.dtype)
            counts[kind] += 1
            params.append(p)
            is_tried = counts[kind] <= MOST_ALIKE and (p.is_floating_point() or p.is_complex())
            shapes.append(shape if is_tried else (0,))
    return params, shapes


def _try_elements(
    optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], shapes: Sequence[Shape]
) -> float | None:
    """Return the state's bytes a value if each value of the parameters may be updated alone, else None."""
    originals = _draw_like(params, shapes)
    # In turns a parameter is on both ranks, on the first, on the second; one alone is on both.
    cuts = [(x.numel() // 2, x.numel(), 0)[i % 3] for i, x in enumerate(originals)]

    def cut_parts(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [(x.reshape(-1)[:cut], x.reshape(-1)[cut:]) for x, cut in zip(tensors, cuts, strict=True)]
        return [first for first, _ in pairs], [second for _, second in pairs]

    whole = OptimizerCopy(optimizer, params, originals)
    parts = [OptimizerCopy(optimizer, params, values) for values in cut_parts(originals)]
    for _ in range(NUM_STEPS):
        gradients = _draw_like(params, shapes)
        whole.step(gradients)
        for part, own in zip(parts, cut_parts(gradients), strict=True):
            part.step(own)
    _check_updated(whole, originals)
    for p, *cut in zip(whole.params, parts[0].params, parts[1].params, strict=True):
        if not has_same_bits(p.detach().reshape(-1), torch.cat([part.detach() for part in cut])):
            return None
    num_bytes = num_values = 0
    for p in whole.params:
        tensors = [value for value in whole.optimizer.state[p].values() if isinstance(value, Tensor) and value.dim()]
        if any(value.shape != p.shape for value in tensors):
            return None
        num_bytes += sum(value.nbytes for value in tensors)
        num_values += p.numel()
    return num_bytes / max(1, num_values)


def _try_parameters(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], shapes: Sequence[Shape]) -> bool:
    """Return whether each parameter may be updated without the others."""
    originals = _draw_like(params, shapes)
    together = OptimizerCopy(optimizer, params, originals)
    parts = [
        OptimizerCopy(optimizer, params, [x if i % 2 == rank else x.new_zeros(0) for i, x in enumerate(originals)])
        for rank in range(2)
    ]
    for _ in range(NUM_STEPS):
        gradients = _draw_like(params, shapes)
        for one in (together, *parts):
            one.step(gradients)
    _check_updated(together, originals)
    pairs = [(p, parts[i % 2].params[i]) for i, p in enumerate(together.params)]
    return all(has_same_bits(p.detach(), other.detach()) for p, other in pairs)


def _check_updated(tried: OptimizerCopy, originals: Sequence[Tensor]) -> None:
    """Raise RuntimeError for a parameter that is as it was."""
    for p, original in zip(tried.params, originals, strict=True):
        if p.numel() and torch.equal(p.detach(), original):
            raise RuntimeError("it does not update the parameters of its groups")


def _draw_like(params: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    """Return random values for parameters, of different magnitudes."""
    drawn = [
        torch.randn(shape, dtype=p.dtype if p.is_floating_point() or p.is_complex() else None, device=p.device)
        for p, shape in zip(params, shapes, strict=True)
    ]
    return [x * 4.0 ** (i % 3) for i, x in enumerate(drawn)]


def check_memory(model: nn.Module, flag: str = OPTIMIZER_FLAG) -> None:
    """Raise UserError if a parameter cannot be divided: it shares memory with another, or has another layout."""
    found: list[tuple[int, int, str]] = []
    for name, p in model.named_parameters():
        tensor = local_tensor(p)
        if not is_writable_in_place(tensor):
            raise UserError(f"{flag}: {name} is not a plain dense tensor, and cannot be divided: leave {flag} out")
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            found.append((begin, begin + (last + 1) * tensor.element_size(), name))
    found.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(found):
        if begin < end:
            raise UserError(
                f"{flag}: the parameters {first} and {second} share memory, which ranks would update differently: make "
                f"them one parameter, or leave {flag} out"
            )


class OptimizerCopy:
    """A copy of an optimizer, and of all that it holds, with other parameters.

    Attributes:
        params: in the order of the originals; those without values are in no group.
        optimizer: of the same class, with the same hyperparameters.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, originals: Sequence[nn.Parameter], values: Sequence[Tensor]
    ) -> None:
        self.params = [nn.Parameter(x.clone()) for x in values]
        copies: dict[Tensor, nn.Parameter] = dict(zip(originals, self.params, strict=True))
        # What it holds besides its groups stays as it would be in training: other tensors than the groups'.
        held = {nn.Parameter(x.clone()): p for x, p in zip(values, self.params, strict=True)}
        self.optimizer: Any = object.__new__(type(optimizer))
        state: Any = defaultdict(dict)
        memo: dict[int, Any] = {id(p): other for p, other in zip(originals, held, strict=True)}
        memo |= {id(optimizer): self.optimizer, id(optimizer.state): state}
        hooks: dict[str, object] = {name: OrderedDict() for name in vars(optimizer) if name.startswith("_optimizer_")}
        for name, value in vars(optimizer).items():
            vars(self.optimizer)[name] = hooks[name] if name in hooks else copy.deepcopy(value, memo)
        for p, kept in optimizer.state.items():  # that is there before the first step
            if p in copies:
                state[copies[p]] = {key: _shape_like(value, p, copies[p]) for key, value in kept.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [held[p] for p in group["params"] if p.numel()]
            group["lr"] = group["lr"] * 0 + TRIAL_LR

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Make a step with these gradients, one a parameter."""
        for p, gradient in zip(self.params, gradients, strict=True):
            p.grad = gradient.clone() if p.numel() else None
        self.optimizer.step()


def _shape_like(value: Any, p: Tensor, own: Tensor) -> Any:
    """Return what a state holds of a parameter for a smaller one."""
    if not isinstance(value, Tensor) or value.shape != p.shape:
        return copy.deepcopy(value)
    return value.reshape(-1)[:1].expand(own.numel()).reshape(own.shape).clone()
