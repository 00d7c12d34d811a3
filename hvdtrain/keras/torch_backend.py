"""The backend torch of Keras: its autograd, without compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hvdtrain.bridge.functions import (
    Array,
    Arrays,
    Batch,
    Functions,
    Place,
    Pullback,
    PureOptimizer,
    Returned,
    UpdateProgram,
)
from hvdtrain.bridge.padding import map_arrays
from hvdtrain.torch.scores import get_numerators


@contextlib.contextmanager
def seeded_torch(entropy: NDArray[Any]) -> Iterator[None]:
    """Seed torch's own generators, which Keras's Dropout draws from, for a while. entropy: (2,) uint32."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(entropy[0]) << 31 ^ int(entropy[1]))
        yield


class TorchBackend:
    """`hvdtrain.bridge.functions.Backend` of Keras on torch: arrays are torch's own tensors."""

    num_compilations = 0

    def __init__(self, device: str) -> None:
        self.device = device

    def import_tensor(self, tensor: Tensor) -> Array:
        return tensor.detach()

    def export_array(self, array: Array) -> Tensor:
        return array.detach()  # type: ignore[no-any-return]

    def compile_score(self, functions: Functions, losses: Sequence[str]) -> TorchScoreProgram:
        return TorchScoreProgram(functions, losses, self.device)

    def compile_update(self, optimizer: PureOptimizer, places: Mapping[str, Place]) -> UpdateProgram:
        """Return the optimizer's update, which changes the parameters and its state in place."""

        @torch.no_grad()
        def update(flats: Sequence[Array], state: Arrays, params: Arrays, factor: float) -> tuple[Arrays, Arrays]:
            gradients = {
                name: flats[place.flat].narrow(0, place.offset, params[name].numel()).view(place.shape)
                for name, place in places.items()
            }
            return optimizer.update(gradients, state, params, torch.tensor(factor))

        return update


class TorchScoreProgram:
    """`hvdtrain.bridge.functions.ScoreProgram` by torch's autograd."""

    def __init__(self, functions: Functions, losses: Sequence[str], device: str) -> None:
        self.functions, self.losses, self.device = functions, losses, device

    def _move_batch(self, batch: Batch) -> Batch:
        return map_arrays(lambda array: torch.from_numpy(array).to(self.device), batch)

    @torch.enable_grad()
    def score_for_training(
        self, params: Arrays, state: Arrays, batch: Batch, entropy: NDArray[Any]
    ) -> tuple[Returned, Pullback]:
        leaves = {name: array.detach().requires_grad_() for name, array in params.items()}
        with seeded_torch(entropy):
            returned = self.functions.score(leaves, state, self._move_batch(batch), entropy)
        keep = len(self.losses) > 1

        def pull_back(cotangents: Mapping[str, Tensor]) -> Arrays:
            numerators = [get_numerators(returned.scores[name]) for name in cotangents]
            found = torch.autograd.grad(
                numerators, list(leaves.values()), list(cotangents.values()), allow_unused=True, retain_graph=keep
            )
            return {
                name: torch.zeros_like(leaf) if gradient is None else gradient
                for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
            }

        return returned, pull_back

    @torch.no_grad()
    def score_for_evaluation(self, params: Arrays, state: Arrays, batch: Batch) -> Returned:
        return self.functions.score(params, state, self._move_batch(batch), None)

    @torch.no_grad()
    def compute_outputs(self, params: Arrays, state: Arrays, batch: Batch) -> Any:
        return self.functions.outputs(params, state, self._move_batch(batch))
