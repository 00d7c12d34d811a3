"""An optimizer of another framework as torch's: its step is a compiled update of whole flat gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from hvdtrain.bridge.functions import Array, Arrays, Place, PureOptimizer, UpdateProgram
from hvdtrain.bridge.shadow import Shadow
from hvdtrain.system.errors import UserError
from hvdtrain.torch.hyperparameters import StateDict

STATE_KEY = "arrays"  # of the state, where torch's optimizers have one entry a parameter


class BridgeOptimizer(torch.optim.Optimizer):
    """Updates some parameters of a shadow by the other framework's optimizer.

    A learning rate is that optimizer's own times a factor. The state is in `state["arrays"]`, by name, so that torch's
    `state_dict` and `load_state_dict` save and load it.
    """

    def __init__(self, shadow: Shadow, optimizer: PureOptimizer) -> None:
        self.shadow, self.pure = shadow, optimizer
        self._params = {name: shadow.param_by_name[name] for name in optimizer.parameters}
        self._programs: dict[tuple[tuple[str, Place], ...], UpdateProgram] = {}
        self._flats: list[Array] = []
        self._flats_memory: list[tuple[int, int, torch.dtype]] = []
        self._arrays, self._exported = optimizer.state, self._export_state(optimizer.state)
        super().__init__(self._params.values(), {"lr": optimizer.lr})
        cast(StateDict, self.state)[STATE_KEY] = self._exported

    def __deepcopy__(self, memo: dict[int, Any]) -> BridgeOptimizer:
        return self  # a recipe that holds it is copied for a trial, which makes no update

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients, at the learning rate of the parameter group."""
        lr = float(vars(self)["param_groups"][0]["lr"])  # the property of a wrapped optimizer waits for gradients
        factor = lr / self.pure.lr if self.pure.lr else 1.0
        flats, places = locate_gradients(self._params)
        key = tuple(places.items())
        program = self._programs.get(key)
        backend = self.shadow.backend
        if program is None:
            program = self._programs[key] = backend.compile_update(self.pure, places)
        params = self.shadow.read_params()
        own = {name: params[name] for name in self._params}
        updated, self._arrays = program(self._import_flats(flats, len(places)), self._read_state(), own, factor)
        self.shadow.set_params(updated)
        self._exported = self._export_state(self._arrays)
        cast(StateDict, self.state)[STATE_KEY] = self._exported

    def _import_flats(self, flats: Sequence[Tensor], num_gradients: int) -> list[Array]:
        """Return flat gradients as arrays: those of the last step if the memory is the same, as an exchange's is."""
        memory = [(flat.data_ptr(), flat.numel(), flat.dtype) for flat in flats]
        if memory != self._flats_memory:
            self._flats, self._flats_memory = [self.shadow.backend.import_tensor(flat) for flat in flats], memory
        arrays = self._flats
        if len(flats) == num_gradients:  # each has memory of its own, which is not to outlive the step
            self._flats, self._flats_memory = [], []
        return arrays

    def _export_state(self, arrays: Arrays) -> dict[str, Tensor]:
        return {name: self.shadow.backend.export_array(array) for name, array in arrays.items()}

    def _read_state(self) -> Arrays:
        """Return the state as arrays: those of the last step, or what was loaded since."""
        there = cast(StateDict, self.state).get(STATE_KEY)
        if there is not self._exported:
            there = there or {}
            if there.keys() != self._exported.keys():
                odd = next(iter(there.keys() ^ self._exported.keys()))
                raise UserError(
                    f"the state of the optimizer has {'no' if odd in self._exported else 'a'} {odd!r}, unlike the "
                    "recipe's optimizer: keep it to resume"
                )
            import_tensor = self.shadow.backend.import_tensor
            self._arrays = {name: import_tensor(there[name].clone()) for name in self._exported}
            self._exported = there
        return self._arrays


def locate_gradients(params: Mapping[str, torch.nn.Parameter]) -> tuple[list[Tensor], dict[str, Place]]:
    """Return the memory that holds the parameters' gradients, whole, and where in it each is.

    Whole, because it begins where an allocator has aligned it: parts of it could not be shared without a copy. A
    parameter without a gradient, as no rank has used it, has zeros.
    """
    flats: list[Tensor] = []
    numbers: dict[tuple[int, torch.dtype], int] = {}  # of a flat, by its address and type
    places = {}
    for name, p in params.items():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
        storage = gradient.untyped_storage()
        key = storage.data_ptr(), gradient.dtype  # complex gradients lie in buckets of real numbers
        if key not in numbers:
            numbers[key] = len(flats)
            flats.append(torch.empty(0, dtype=gradient.dtype, device=gradient.device).set_(storage))
        places[name] = Place(numbers[key], int(gradient.storage_offset()), tuple(gradient.shape))
    return flats, places
