"""What a step changes besides the optimizer's update: parameters, buffers and learning rates, on all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from hvdtrain.exchange.tensors import is_finite
from hvdtrain.torch.buffer_reducer import BufferReducer
from hvdtrain.torch.buffers import Mode, refuse_nonfinite
from hvdtrain.torch.modes import Modes
from hvdtrain.torch.watch import LearningRates, ParameterWatch

Groups = Sequence[dict[str, Any]]  # of an optimizer


class Changes:
    """Watches all that `score` may change, and keeps it the same on all ranks or refuses it on all of them.

    `start_step`, the forward passes, `votes`, then with the votes summed over ranks `settle`; then `accept` or `skip`.
    """

    def __init__(
        self,
        recipe: str,
        model: nn.Module,
        modes: Modes,
        buffer_modes: Mapping[str, Mode],
        size: int,
        deterministic: bool,
    ) -> None:
        """recipe: its name. size: the number of ranks."""
        self.modes = modes
        self.buffers = BufferReducer(recipe, model, buffer_modes, size, deterministic)
        self.parameters = ParameterWatch(recipe, model, size, deterministic)
        self.rates = LearningRates(recipe)
        self.model = model
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self._infinite = {name for name, p in frozen if not is_finite(p)}  # from the start: a mask, say

    @property
    def places(self) -> int:
        """How many numbers `votes` returns."""
        return 2 + self.buffers.places

    def start_step(self) -> None:
        """A step begins: its forward passes follow."""
        self.end_evaluation()
        self.buffers.start_step()
        self.parameters.start_step()

    def votes(self, groups: Groups) -> list[float]:
        """Return 1 for what has changed on this rank: its parameters, its learning rates, each buffer."""
        return [float(self.parameters.changes()), float(self.rates.changed(groups)), *self.buffers.changes()]

    def settle(self, votes: Sequence[float], passes: int) -> None:
        """Combine what has changed. votes: summed over ranks. passes: how often this rank has called score.

        Raises UserError on all ranks for what cannot be kept the same on them.
        """
        if votes[0]:
            self.parameters.agree(int(votes[0]), passes)
        if votes[1]:
            raise self.rates.refuse()
        self.buffers.finish(votes[2:])

    def accept(self) -> None:
        """Take the parameters as they are now, after an update, for unchanged."""
        self.parameters.accept()

    def skip(self) -> None:
        """Undo what the step did to buffers."""
        self.buffers.restore()
        self.parameters.accept()

    def take_loaded(self, groups: Groups) -> None:
        """Take all as it is now, after it was loaded, for unchanged."""
        self.buffers.accept()
        self.parameters.accept()
        self.rates.accept(groups)

    def refuse_nonfinite(self) -> None:
        """Raise RunError if a parameter, or a buffer that has changed, is not finite and was not so from the start."""
        tensors = [(name, p) for name, p in self.model.named_parameters() if name not in self._infinite]
        refuse_nonfinite([*tensors, *((b.name, b.tensor) for b in self.buffers.changing)])

    def start_evaluation(self) -> bool:
        """Put the model into evaluation mode. Returns whether an evaluation begins."""
        begins = not self.modes.evaluating
        if begins:
            self.buffers.remember()
            self.modes.evaluate()
        return begins

    def end_evaluation(self) -> None:
        """Put the modules into their modes of training, and back what an evaluation has done to buffers."""
        if self.modes.train():
            self.buffers.restore()

    def start_world(self, size: int) -> None:
        """Continue with so many ranks."""
        self.modes.train()
        self.buffers.start_world(size)
        self.parameters.start_world(size)
