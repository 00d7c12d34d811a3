"""The state of the recipe's optimizers in checkpoints, with what their exchanges carry from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hvdtrain.system.errors import UserError
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.optimized_loss import OptimizedLoss
from hvdtrain.torch.pruning import Pruner
from hvdtrain.torch.rounds import Rounds
from hvdtrain.torch.scores import LossNames


class UpdaterState:
    """The part of `hvdtrain.torch.update.Updater` that is saved and loaded."""

    losses: tuple[OptimizedLoss, ...]
    several: bool
    scaler: torch.amp.GradScaler | None
    pruner: Pruner | None
    rounds: Rounds
    _saves_residuals: bool

    @property
    def loss_names(self) -> LossNames:
        """The names of the losses."""
        raise NotImplementedError

    def gather_carried_state(self) -> dict[str, object] | None:
        """Return the exchanges' part of a checkpoint, the same on all ranks, all of which call this.

        After rounds, their optimizers' states are the same then as well.
        """
        self.rounds.average_states()
        return self._join_carried({loss.name: loss.carried.gather(self._saves_residuals) for loss in self.losses})

    def local_carried_state(self) -> dict[str, object] | None:
        """Return the exchanges' part of this rank's checkpoint after the world has broken, without what is unsent."""
        return self._join_carried({loss.name: loss.carried.get_local() for loss in self.losses})

    def _join_carried(self, parts: Mapping[str, dict[str, object] | None]) -> dict[str, object] | None:
        if not self.several:
            return parts[self.losses[0].name]
        return {name: part for name, part in parts.items() if part is not None} or None

    def optimizer_state(self) -> StateDict:
        """Return all of the state but the exchanges' part."""
        states = {loss.name: loss.get_state() for loss in self.losses}
        state = {"optimizers": states} if self.several else states[self.losses[0].name]
        if (rounds := self.rounds.to_state()) is not None:
            state = {**state, "rounds": rounds}
        if self.scaler is not None:
            state = {**state, "scaler": self.scaler.state_dict()}
        return state if self.pruner is None else {**state, "pruned": self.pruner.get_state()}

    def load_state(self, state: StateDict) -> None:
        """Load a state. Raises UserError or torch's own errors for one of other parameters."""
        carried = state.get("exchange")
        if self.pruner is not None:
            self.pruner.load_state(state.get("pruned"))
        elif "pruned" in state:
            raise UserError("the checkpoint's weights are pruned, and would grow again: give its --prune to resume")
        if not self.several and "optimizers" not in state:
            self.losses[0].load_state(state, carried)
        else:
            saved = state.get("optimizers", {"loss": state})
            names = self.loss_names.names
            if sorted(saved) != sorted(names) or not self.several:
                raise UserError(
                    f"the checkpoint's optimizers minimize {', '.join(saved)}, and this run's {', '.join(names)}: "
                    "return the same from optimizer() to resume"
                )
            for loss in self.losses:
                loss.load_state(saved[loss.name], None if carried is None else carried.get(loss.name))
        self.rounds.load_state(state.get("rounds"))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        for loss in self.losses:
            loss.leave_out_pruned()
