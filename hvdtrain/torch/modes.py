"""Which modules of a model train and which evaluate: as the recipe left them, but for the time of an evaluation."""

from __future__ import annotations

from torch import nn


class TrainingModes:
    """Puts a model into evaluation mode, and back to what each of its modules was in before.

    A layer that `model()` has put into evaluation mode (a frozen batch norm) stays there, and what `score` changes
    stays changed. A model's own `train` and `eval` are called, for some do more than set the modes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.started_in_eval = not any(module.training for module in model.modules())
        before = [(module, module.training) for module in model.modules()]
        if not self.started_in_eval:
            model.train()  # one that keeps layers frozen in its `train` does so from the start
            _restore_modes([(module, module.training and training) for module, training in before])
        self._saved_modes: list[tuple[nn.Module, bool]] | None = None  # during an evaluation

    def get_warnings(self) -> list[str]:
        """Return a line for the user if the model as a whole does not train."""
        if not self.started_in_eval:
            return []
        return [
            "modes     model() returns the model in evaluation mode, in which it stays: without dropout, and with "
            "fixed batch statistics; to train them, call .train() there"
        ]

    @property
    def is_evaluating(self) -> bool:
        return self._saved_modes is not None

    def enter_evaluation(self) -> None:
        """Put all modules into evaluation mode."""
        if self._saved_modes is None:
            self._saved_modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()

    def leave_evaluation(self) -> bool:
        """End the evaluation, if there is one. Returns whether there was."""
        if self._saved_modes is None:
            return False
        if self._saved_modes[0][1]:
            self.model.train()
        _restore_modes(self._saved_modes)
        self._saved_modes = None
        return True


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Set each module's mode, parents first."""
    for module, training in modes:
        if module.training != training and type(module).train is not nn.Module.train:
            module.train(training)
        module.training = training
