"""What a step changes apart from the optimizer's update: parameters, buffers, learning rates; the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hvdtrain.torch.buffer_reducer import BufferReducer
from hvdtrain.torch.buffers import BufferMode, check_tensors_finite
from hvdtrain.torch.hyperparameters import ParamGroup
from hvdtrain.torch.modes import TrainingModes
from hvdtrain.torch.tensors import is_finite
from hvdtrain.torch.watch import LearningRateWatch, ParameterWatch


class ChangeTracker:
    """Watches all that `score` may change, and keeps it the same on all ranks or refuses it on all of them.

    A step is `start_step`, the forward passes, `collect_change_flags`, with the flags summed over ranks
    `reconcile_changes`; then `accept_update` or `skip_step`.
    """

    def __init__(
        self,
        recipe: str,
        model: nn.Module,
        modes: TrainingModes,
        buffer_modes: Mapping[str, BufferMode],
        size: int,
        deterministic: bool,
    ) -> None:
        """Watch a model on all ranks.

        Args:
            recipe: its name.
            model: as the recipe made it.
            modes: in which its modules train.
            buffer_modes: how declared buffers are combined, by name.
            size: the number of ranks.
            deterministic: whether nothing may change that depends on the ranks.
        """
        self.training_modes = modes
        self.buffer_reducer = BufferReducer(recipe, model, buffer_modes, size, deterministic)
        self.parameter_watch = ParameterWatch(recipe, model, size, deterministic)
        self.learning_rate_watch = LearningRateWatch(recipe)
        self.model = model
        frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self._initially_nonfinite = {name for name, p in frozen if not is_finite(p)}  # from the start: a mask

    @property
    def num_change_flags(self) -> int:
        """How many numbers `collect_change_flags` returns."""
        return 2 + self.buffer_reducer.num_change_flags

    def start_step(self) -> None:
        """Start a step: its forward passes follow."""
        self.end_evaluation()
        self.buffer_reducer.start_step()
        self.parameter_watch.start_step()

    def collect_change_flags(self, groups: Sequence[ParamGroup]) -> list[float]:
        """Return 1 for what has changed on this rank: its parameters, its learning rates, each buffer."""
        return [
            float(self.parameter_watch.detect_changes()),
            float(self.learning_rate_watch.has_changed(groups)),
            *self.buffer_reducer.detect_changes(),
        ]

    def reconcile_changes(self, votes: Sequence[float], passes: int, local_steps: int | None) -> None:
        """Combine what has changed.

        Args:
            votes: the change flags, summed over ranks.
            passes: how often this rank has called score.
            local_steps: of a round, between whose ends ranks have different parameters; None: there are no rounds.

        Raises:
            UserError: on all ranks, for what cannot be kept the same on them.
        """
        if votes[0]:
            self.parameter_watch.reconcile_parameters(int(votes[0]), passes, local_steps)
        if votes[1]:
            raise self.learning_rate_watch.build_error()
        self.buffer_reducer.finish_combining(votes[2:])

    def accept_update(self, groups: Sequence[ParamGroup]) -> None:
        """Take parameters and learning rates as they are now, after an update, for unchanged."""
        self.parameter_watch.set_baseline()
        self.learning_rate_watch.set_baseline(groups)

    def skip_step(self) -> None:
        """Undo what the step did to buffers."""
        self.buffer_reducer.restore_values()
        self.parameter_watch.set_baseline()

    def accept_loaded_state(self, groups: Sequence[ParamGroup]) -> None:
        """Take all as it is now, after it was loaded, for unchanged."""
        self.buffer_reducer.set_baseline()
        self.parameter_watch.set_baseline()
        self.learning_rate_watch.set_baseline(groups)

    def check_state_finite(self, whole: Mapping[str, Tensor]) -> None:
        """Raise RunError if a parameter, or a buffer that has changed, is not finite and was not so from the start.

        whole: parameters of which this rank has a part, gathered.
        """
        named = [(name, p) for name, p in self.model.named_parameters() if name not in self._initially_nonfinite]
        tensors = [(name, whole.get(name, p)) for name, p in named]
        check_tensors_finite([*tensors, *((b.name, b.tensor) for b in self.buffer_reducer.changed_buffers)])

    def start_evaluation(self) -> bool:
        """Put the model into evaluation mode. Returns whether an evaluation begins."""
        begins = not self.training_modes.is_evaluating
        if begins:
            self.buffer_reducer.save_values()
            self.training_modes.enter_evaluation()
        return begins

    def end_evaluation(self) -> None:
        """Put the modules into their modes of training, and back what an evaluation has done to buffers."""
        if self.training_modes.leave_evaluation():
            self.buffer_reducer.restore_values()

    def set_world_size(self, size: int) -> None:
        """Continue with `size` ranks."""
        self.training_modes.leave_evaluation()
        self.buffer_reducer.set_world_size(size)
        self.parameter_watch.set_world_size(size)
