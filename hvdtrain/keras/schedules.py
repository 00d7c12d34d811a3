"""A learning rate of Keras that follows a schedule of hvdtrain, on any backend, compiled or not."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from hvdtrain.recipe.schedule import parse_schedule
from hvdtrain.system.errors import UserError


@keras.saving.register_keras_serializable(package="hvdtrain")
class TextSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A learning rate for an optimizer of Keras by the text of a schedule (`hvdtrain.recipe.schedule`).

    keras.optimizers.SGD(TextSchedule("warmup:5ep cosine", 0.1 * hvd.size(), epochs=90, steps_per_epoch=len(batches)))

    Steps are batches of `model.fit`, as Keras counts them: also those whose gradients are only accumulated. After the
    last step the learning rate stays.
    """

    def __init__(self, text: str, learning_rate: float, *, epochs: int, steps_per_epoch: int) -> None:
        """Compute the learning rate of each step.

        Args:
            text: such as "warmup:5ep cosine" or "step:30ep,60ep x0.1".
            learning_rate: what 1 in the schedule is.
            epochs: of the whole training.
            steps_per_epoch: batches of a rank in an epoch.

        Raises:
            UserError: the text is not a schedule, or one that evaluations decide.
        """
        self.text, self.learning_rate, self.epochs, self.steps_per_epoch = text, learning_rate, epochs, steps_per_epoch
        steps = max(1, epochs * steps_per_epoch)
        schedule = parse_schedule(text, steps, steps_per_epoch)
        if schedule.plateau is not None:
            raise UserError(
                f"schedule {text!r}: evaluations decide on it, which model.fit does with "
                "keras.callbacks.ReduceLROnPlateau, after MetricAverageCallback"
            )
        self._rates = np.array([learning_rate * schedule.factor(step) for step in range(steps)], np.float32)

    def __call__(self, step: Any) -> Any:
        """Return the learning rate at a step, as a tensor."""
        place = ops.minimum(ops.cast(step, "int32"), len(self._rates) - 1)
        return ops.take(ops.convert_to_tensor(self._rates), place)

    def get_config(self) -> dict[str, object]:
        """Return the arguments, for a saved model."""
        sizes = {"epochs": self.epochs, "steps_per_epoch": self.steps_per_epoch}
        return {"text": self.text, "learning_rate": self.learning_rate, **sizes}
