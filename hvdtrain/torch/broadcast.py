"""The same parameters, buffers and optimizer state on all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdtrain.comm import collectives
from hvdtrain.comm.agreement import check_agreement
from hvdtrain.torch.consistency import model_parts
from hvdtrain.torch.readable import check_readable, make_savable
from hvdtrain.torch.tensors import is_writable_in_place, named_tensors, overwrite_tensor, read_tensors, write_tensors


def broadcast_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    root: int = 0,
    process_set: collectives.Group = None,
) -> None:
    """Overwrite parameters, buffers and optimizer state with the root's, in any memory format.

    Raises UserError on all ranks, before anything is overwritten, if their models differ in names, order or shapes.

    root: a rank among all, even if a process_set is given; it must be in it.
    """
    if collectives.size(process_set) == 1:
        return
    check_agreement("state.agreement", model_parts(model), process_set)
    everything = [t for _, t in named_tensors(model)]
    tensors = [t for t in everything if is_writable_in_place(t)]
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        part = [t.detach() for t in tensors if t.dtype == dtype]
        # As bytes: Horovod does not know every dtype.
        flat = torch.cat([t.reshape(-1) for t in part]).view(torch.uint8)
        collectives.broadcast_(flat, f"state.{dtype}", root, process_set)
        for t, piece in zip(part, torch.split(flat.view(dtype), [t.numel() for t in part]), strict=True):
            t.copy_(piece.view(t.shape))
    if odd := [
        t for t in everything if not is_writable_in_place(t)
    ]:  # sparse, expanded, quantized: the same already, as a rule
        data = collectives.broadcast_bytes(write_tensors([t.detach() for t in odd]), "state.odd", root, process_set)
        for t, value in zip(odd, read_tensors(data), strict=True):
            overwrite_tensor(model, t, value)
    if optimizer is not None:
        broadcast_optimizer(optimizer, root, process_set)


def broadcast_optimizer(optimizer: torch.optim.Optimizer, root: int = 0, process_set: collectives.Group = None) -> None:
    """Overwrite an optimizer's state with the root's."""
    if collectives.size(process_set) == 1:
        return
    make_savable(optimizer)
    state = optimizer.state_dict()
    check_readable(state, "the optimizer's state")
    data = collectives.broadcast_bytes(write_tensors(state), "state.optimizer", root, process_set)
    if collectives.rank() != root:
        loaded = read_tensors(data)
        load_in_place(optimizer, lambda: optimizer.load_state_dict(loaded))


def load_in_place(optimizer: torch.optim.Optimizer, load: Callable[[], object]) -> None:
    """Call `load`, and keep the groups and the state the objects that they were, with what was loaded in them.

    Others hold them: an optimizer around another shares its groups and its state.
    """
    groups, state = optimizer.param_groups, optimizer.state
    load()
    loaded = optimizer.param_groups
    if loaded is not groups and len(loaded) == len(groups):
        for number, (old, new) in enumerate(zip(groups, loaded, strict=True)):
            if old is not new:
                old.clear()
                old.update(new)
                loaded[number] = old
    if optimizer.state is not state:
        state.clear()
        state.update(optimizer.state)
        optimizer.state = state
