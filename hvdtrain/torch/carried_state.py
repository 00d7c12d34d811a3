"""What an optimizer's exchange carries from step to step: in checkpoints, and from one world to the next."""

from __future__ import annotations

from dataclasses import replace

from hvdtrain.exchange.bucketed import BucketedExchange
from hvdtrain.exchange.state import (
    ExchangeState,
    gather_exchange_state,
    load_exchange_state,
    local_exchange_state,
    restore_local_state,
    scale_state,
)
from hvdtrain.torch.hyperparameters import StateDict


class CarriedState:
    """Residuals, velocities and codec states of an exchange.

    Attributes:
        exchange: of this world; None if nothing is carried.
    """

    def __init__(self) -> None:
        self.exchange: BucketedExchange | None = None
        self._kept: ExchangeState | None = None  # of the world before, until a state is loaded

    def keep(self) -> None:
        """Keep what the exchange has not sent for the next world."""
        if self.exchange is not None and (self._kept is None or self.exchange.buckets):
            self._kept = local_exchange_state(self.exchange)
            # Else the world broke before the state was loaded into it.

    def scale(self, factor: float) -> None:
        """Multiply all, when the loss scale changes by a factor."""
        if self.exchange is not None:
            scale_state(self.exchange, factor)

    def gather(self, exact: bool) -> dict[str, object] | None:
        """Return the part of a checkpoint, the same on all ranks, all of which call this.

        exact: also each rank's own tensors.
        """
        return None if self.exchange is None else gather_exchange_state(self.exchange, exact).to_checkpoint()

    def get_local(self) -> dict[str, object] | None:
        """Return the part of this rank's checkpoint after the world has broken, without what is unsent."""
        return None if self._kept is None else replace(self._kept, unsent={}, velocities={}).to_checkpoint()

    def load(self, saved: StateDict | None) -> None:
        """Load the part of a checkpoint; None: it has none."""
        if self.exchange is None or saved is None:
            return
        loaded = ExchangeState.from_checkpoint(saved)
        load_exchange_state(self.exchange, loaded)
        # A checkpoint of the run folder has what all ranks have not sent.
        if self._kept is not None and not (loaded.unsent or loaded.velocities):
            restore_local_state(self.exchange, self._kept)
        self._kept = None
