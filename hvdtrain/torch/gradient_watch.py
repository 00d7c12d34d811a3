"""Whether a loss depends on a parameter that is trained."""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.system.errors import UserError

# A detector's first batches may hold no object, so that their loss is zero without a graph; 5 in a row do not.
MAX_STEPS_WITHOUT_GRADIENT = 5


@dataclass
class GradientWatch:
    """Counts the first steps of a loss in which no rank has a gradient."""

    recipe_name: str
    loss_name: str
    owner: str  # of the parameters, for the message: " of its own optimizer", or ""
    steps: int | None = 0  # made without any gradient; None: there has been one

    def check_gradient(self, loss: float, has_gradient: bool) -> None:
        """Raise UserError if no rank's loss has depended on a parameter so far, and that is not by chance.

        Args:
            loss: the sum of the step's losses over all ranks.
            has_gradient: whether the sum of the gradients over all ranks is there, of any parameter.
        """
        if self.steps is None or has_gradient:
            self.steps = None
            return
        self.steps += 1
        if loss or self.steps == MAX_STEPS_WITHOUT_GRADIENT:
            raise UserError(
                f"{self.recipe_name}.score: {self.loss_name!r} depends on no parameter{self.owner} that is trained, on "
                "no rank: compute it from the model's outputs, without detach(), item() or no_grad(), and with "
                "parameters that require a gradient"
            )
