"""The state of a training as bytes: the model, the optimizer, what the exchange carries over, and averages."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.consistency import check_same_model
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.tensors import load_module_state, read_tensors
from hvdtrain.torch.update import Updater


def serialize_state(
    model: nn.Module, updater: Updater, ema: AveragedModel | None, carried: Mapping[str, object] | None
) -> bytes:
    """Return the state as bytes. carried: what the exchange carries from step to step; None: nothing."""
    if ema is not None:
        ema.copy_constants(model)
    state: dict[str, object] = {"model": model.state_dict(), **updater.optimizer_state()}
    if carried is not None:
        state["exchange"] = carried
    if ema is not None:
        state["ema"] = ema.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore_state(
    data: bytes, device: torch.device, model: nn.Module, updater: Updater, ema: AveragedModel | None
) -> None:
    """Load what `serialize_state` has returned. Raises UserError if it is of another model, optimizer or options."""
    state = read_tensors(data, device)
    for part, needed in (("scaler", updater.scaler is not None), ("ema", ema is not None)):
        if needed != (part in state):
            raise UserError(
                f"the checkpoint has {'no' if needed else 'a'} {part} state: keep the run's options to resume"
            )
    check_same_model(model, state["model"])
    try:
        load_module_state(model, state["model"])
        updater.load_state(state)
        if ema is not None:
            load_module_state(ema, state["ema"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the checkpoint is of another model or optimizer: {reason}") from error
