"""hvdtrain's gradient compression as a communication hook of torch's DistributedDataParallel (DDP), without Horovod.

hook = hvdtrain.torch.ddp_hook("powersgd:4")
hook.register(model)                                    model: a DistributedDataParallel
model.register_comm_hook(hook, hook.callback)           the same, for what takes a hook and its state
"""

# Without `from __future__ import annotations`: DDP compares the annotations of a hook with classes.
import gc
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hvdtrain.compression.spec import AUTO, Spec, parse_compression
from hvdtrain.exchange.state import ExchangeState
from hvdtrain.system.errors import UserError
from hvdtrain.torch.ddp_exchange import DdpExchange

LOSS_SCALE = "loss_scale"  # in a saved state: what its residuals are multiplied with


def ddp_hook(compression: str, *, seed: int = 0, grad_scaler: torch.amp.GradScaler | None = None) -> "DdpHook":
    """Return a communication hook that averages the gradients of a DistributedDataParallel by a compression.

    The mean is over the ranks of the model's process group (gloo on CPUs, nccl on GPUs), as DDP's own. Make it, and
    register it, on all ranks alike.

    Args:
        compression: a specification (`hvdtrain.compression.spec`), but not "auto".
        seed: of compression's randomness, the same on all ranks.
        grad_scaler: that the losses are scaled by, if any: what a step has not sent follows its scale.

    Raises:
        UserError: the compression is not valid.
    """
    spec = parse_compression(compression)
    if spec.method == AUTO:
        raise UserError(
            "ddp_hook takes no compression 'auto', which is measured in hvdtrain's own exchange: choose a method by "
            "`hvdtrain bench compression`, such as powersgd:4"
        )
    return DdpHook(spec, seed, grad_scaler)


class DdpHook:
    """A communication hook of one model, with error feedback.

    Attributes:
        exchange: of the model, when it is known.
    """

    def __init__(self, spec: Spec, seed: int, grad_scaler: torch.amp.GradScaler | None) -> None:
        self.spec, self.seed, self.grad_scaler = spec, seed, grad_scaler
        self.exchange: DdpExchange | None = None
        self._loaded: tuple[ExchangeState, float] | None = None  # before the model is known: a state, its loss scale

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last backward pass, and received as many."""
        return self.exchange.wire_bytes if self.exchange is not None else 0

    def register(self, model: DistributedDataParallel) -> None:
        """Let a model average its gradients by this hook, on all ranks of its process group.

        Raises:
            UserError: the model is not a DistributedDataParallel, the hook has one already, or it cannot do what the
                model needs.
        """
        if not isinstance(model, DistributedDataParallel):
            raise UserError(
                f"ddp_hook takes a torch.nn.parallel.DistributedDataParallel, not a {type(model).__name__}: wrap the "
                "model before hook.register(model)"
            )
        self._set_model(model)
        model.register_comm_hook(self, self.callback)

    def _set_model(self, model: DistributedDataParallel) -> None:
        if self.exchange is not None:
            raise UserError("this ddp_hook is registered already: make one for each model")
        self.exchange = DdpExchange(model, self.spec, self.seed)
        if self._loaded is not None:
            (state, self.exchange.loss_scale), self._loaded = self._loaded, None
            self.exchange.load_state(state)

    def callback(
        self,
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """Start the mean of a bucket of DDP's: the function to give to `register_comm_hook`."""
        if self.exchange is None:
            self._set_model(self._find_model())
        assert self.exchange is not None
        if self.grad_scaler is not None and bucket.index() == 0:
            self.exchange.set_loss_scale(self.grad_scaler.get_scale())
        return self.exchange.start_reduction(bucket)

    def _find_model(self) -> DistributedDataParallel:
        """Return the model that this hook was given to by `register_comm_hook`, which does not pass it on."""
        models: list[DistributedDataParallel] = [
            found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)
        ]
        hooks = [(model, function) for model in models for function, _ in model._comm_hooks]
        registered = [model for model, function in hooks if getattr(function, "__self__", None) is self]
        if len(registered) != 1:
            raise UserError(f"this ddp_hook is registered with {len(registered)} models: make one for each model")
        return registered[0]

    def state_dict(self) -> dict[str, Any]:  # by name, as torch's state dicts
        """Return what is not sent yet, summed over ranks, and the steps: for any number of ranks.

        All ranks of the process group call it between two steps, and all get the same, which one of them saves.
        """
        if self.exchange is None:
            state, loss_scale = self._loaded or (ExchangeState(), 1.0)
        else:
            state, loss_scale = self.exchange.gather_state(), self.exchange.loss_scale
        return {**state.to_checkpoint(), LOSS_SCALE: loss_scale}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, of which every rank that has loaded it gets an equal part; before or after `register`.

        Raises:
            UserError: it is not a state of `ddp_hook`, or of another model.
        """
        try:
            loaded, loss_scale = ExchangeState.from_checkpoint(state_dict), float(state_dict[LOSS_SCALE])
        except (KeyError, TypeError) as error:
            raise UserError(f"this is not a state of ddp_hook: it has no {error}; expected hook.state_dict()") from None
        if self.exchange is None:
            self._loaded = loaded, loss_scale
        else:
            self.exchange.load_state(loaded)
            self.exchange.loss_scale = loss_scale
