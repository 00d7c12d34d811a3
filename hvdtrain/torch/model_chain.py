"""A model as a chain of modules, each of which gets what the one before has returned: what a pipeline cuts.

Which modules these are is seen in a forward pass: a module whose forward only calls others, one after the other, is
replaced by them, again and again; what does more stays whole.

    GPT.forward:  bytes -> blocks -> norm -> output      blocks, a Sequential:  blocks.0 -> blocks.1
    its chain:    bytes, blocks.0, blocks.1, norm, output
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from hvdtrain.system.errors import UserError

HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Passed:
    """What goes from one module of a chain to the next.

    Attributes:
        structure: of nested tuples, lists and dicts of tensors.
        tensors: examples of them, (B, ...), on the meta device.
    """

    structure: TreeSpec
    tensors: tuple[Tensor, ...]

    @property
    def has_gradient(self) -> bool:
        """Whether a derivative goes back through it."""
        return any(x.requires_grad for x in self.tensors)


@dataclass(frozen=True)
class Link:
    """A module of a chain.

    Attributes:
        number: in the chain.
        name: in the model.
        spreads: whether it is called with the items of what it gets as its arguments.
        writes: whether it changes what it gets in place.
        returned: what it returns.
    """

    number: int
    name: str
    spreads: bool
    writes: bool
    returned: Passed


@dataclass
class ModuleCall:
    """A module's call in a forward pass."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    has_keywords: bool
    versions: list[int]
    result: Any = None
    result_versions: list[int] = field(default_factory=list)
    writes: bool = False  # it has changed its arguments in place
    inner: list[ModuleCall] = field(default_factory=list)


def list_tensor_versions(value: Any) -> list[int]:
    """Return what changes when a tensor in nested containers is written in place."""
    return [x._version for x in tree_leaves(value) if isinstance(x, Tensor)]


@contextlib.contextmanager
def record_calls(model: nn.Module) -> Iterator[list[ModuleCall]]:
    """Record the calls of a model and its modules; yields the list of those of the model."""
    outer: list[ModuleCall] = []
    stack: list[ModuleCall] = []
    handles = []

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, object]) -> None:
            call = ModuleCall(name, module, args, bool(kwargs), list_tensor_versions(args))
            (stack[-1].inner if stack else outer).append(call)
            stack.append(call)

        return hook

    def leave(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        call = stack.pop()
        call.result, call.result_versions = result, list_tensor_versions(result)
        call.writes = list_tensor_versions(call.args) != call.versions

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield outer
    finally:
        for handle in handles:
            handle.remove()


def is_passed_on(before: Any, after: Any) -> bool:
    """Return whether two values have the same objects as tensors, in the same order."""
    left, right = tree_leaves(before), tree_leaves(after)
    return len(left) == len(right) > 0 and all(a is b for a, b in zip(left, right, strict=True))


def find_difference(call: ModuleCall, hooked: bool) -> str | None:
    """Return what a module does besides calling others one after the other; None: nothing.

    hooked: whether it has hooks of its own.
    """
    who = type(call.module).__name__
    if not call.inner:
        return f"{who} calls no module"
    if hooked or "forward" in vars(call.module):
        return f"{who} has hooks, or a forward of its own"
    value, versions, what = call.args, call.versions, f"the arguments of {who}"
    for number, inner in enumerate(call.inner):
        given: Any = inner.args if number == 0 or not is_single(inner, value) else inner.args[0]
        if inner.has_keywords:
            return f"{inner.name!r} is called with keywords; pass its arguments by position"
        if not is_passed_on(value, given) or not has_same_form(value, given, number):
            return f"{inner.name!r} is not given {what}, and nothing else"
        if inner.versions != versions:
            return f"{what} {'are' if number == 0 else 'is'} changed before {inner.name!r}"
        value, versions, what = inner.result, inner.result_versions, f"what {inner.name!r} returns"
    if call.result is not value and not is_passed_on(value, call.result):
        return f"{who} does not return {what}"
    if call.result_versions != versions:
        return f"{what} is changed before {who} returns it"
    inside = {id(p) for inner in call.inner for p in (*inner.module.parameters(), *inner.module.buffers())}
    left = [
        name
        for name, p in (*call.module.named_parameters(), *call.module.named_buffers())
        if id(p) not in inside and name
    ]
    return f"{who} has {left[0]!r}, which is in none of the modules that it calls" if left else None


def is_single(call: ModuleCall, value: Any) -> bool:
    """Return whether a module is given a value as its one argument."""
    return len(call.args) == 1 and not (isinstance(value, tuple) and len(value) == 1 and call.args[0] is value[0])


def has_same_form(value: Any, given: Any, number: int) -> bool:
    """Return whether a value is given in the form that it was returned in."""
    if number == 0:
        return len(value) == len(given)
    structure = tree_flatten(value)[1]
    return structure == tree_flatten(given)[1] or (isinstance(value, list) and list(given) == value)


def expand_call(call: ModuleCall, hooked: set[int]) -> list[ModuleCall]:
    """Return the calls of a chain that do what a module's call does; itself if it does more."""
    if find_difference(call, id(call.module) in hooked) is not None:
        return [call]
    return [part for inner in call.inner for part in expand_call(inner, hooked)]


def find_chain(model: nn.Module, run: Any, whose: str) -> list[Link]:
    """Return the chain of a model.

    Args:
        model: whose modules are called by `run`; all examples of a batch that it is given are alike in form.
        run: calls the model once, with tensors (B, ...) in training mode.
        whose: what messages call the model.

    Raises:
        UserError: it is no chain of at least two modules, or one passes on what is not tensors.
    """
    hooked = {id(m) for m in model.modules() if any(vars(m).get(table) for table in HOOK_TABLES)}
    with record_calls(model) as calls:
        run()
    (call,) = calls
    parts = expand_call(call, hooked)
    if len(parts) < 2:
        raise UserError(
            f"--stages: {whose} cannot be cut: {find_difference(call, id(model) in hooked) or 'it has one module'}; "
            "write the model as a chain, such as nn.Sequential(...), in which each module gets what the one before "
            "returns, or leave out --stages"
        )
    names = [part.name for part in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--stages: {whose} calls {twice!r} twice in a pass, and a stage has it once; copy the module")
    links, value = [], call.args
    for number, part in enumerate(parts):
        spreads = number == 0 or not is_single(part, value)
        links.append(Link(number, part.name, spreads, part.writes, describe_passed(part)))
        value = part.result
    if parts[0].writes:
        raise UserError(
            f"--stages: {names[0]!r} changes the model's input in place, which score may read; copy it there"
        )
    return links


def describe_passed(call: ModuleCall) -> Passed:
    """Return what a module has returned, as it is to be passed on. Raises UserError for what is not tensors."""
    leaves, structure = tree_flatten(call.result)
    for x in leaves:
        if not isinstance(x, Tensor):
            raise UserError(
                f"--stages: {call.name!r} returns a {type(x).__name__}, which cannot be sent to the next stage; return "
                "tensors, alone or in tuples, lists and dicts"
            )
    tensors = [torch.empty_like(x, device="meta", requires_grad=False) for x in leaves]
    for empty, x in zip(tensors, leaves, strict=True):
        empty.requires_grad_(x.requires_grad)
    return Passed(structure, tuple(tensors))


def check_examples(passed: Passed, count: int, what: str) -> None:
    """Raise UserError unless what is passed on of `count` examples is (B, ...). what: it is."""
    for x in passed.tensors:
        if x.dim() == 0 or x.shape[0] != count:
            raise UserError(
                f"--stages: {what} has shape {tuple(x.shape)} for {count} examples; expected a first axis of examples, "
                "(B, ...): each stage gets some of them at a time"
            )


def resize_passed(passed: Passed, size: int) -> Passed:
    """Return what is passed on of `size` examples."""
    tensors = [torch.empty(size, *x.shape[1:], dtype=x.dtype, device="meta") for x in passed.tensors]
    for resized, x in zip(tensors, passed.tensors, strict=True):
        resized.requires_grad_(x.requires_grad)
    return replace(passed, tensors=tuple(tensors))


def call_link(link: Link, module: nn.Module, value: Any) -> Any:
    """Return what a module of a chain returns for what the one before has returned."""
    return module(*value) if link.spreads else module(value)


def run_chain(links: Sequence[Link], model: nn.Module, args: tuple[Any, ...]) -> Any:
    """Return what a chain's modules return for a model's arguments."""
    value: Any = args
    for link in links:
        value = call_link(link, model.get_submodule(link.name), value)
    return value


def pack_tensors(structure: TreeSpec, tensors: Sequence[Tensor]) -> Any:
    """Return tensors in the containers that they were passed in."""
    return tree_unflatten(list(tensors), structure)
