"""The state of a loss's optimizer in checkpoints, whole, also if each rank has a part of it."""

from __future__ import annotations

from torch import nn

from hvdtrain.torch.carried_state import CarriedState
from hvdtrain.torch.groups import align_state, get_parameter_names
from hvdtrain.torch.hyperparameters import ParamGroup, StateDict, apply_overrides
from hvdtrain.torch.local_parts import LocalParts
from hvdtrain.torch.optimizer_methods import WrappedOptimizer
from hvdtrain.torch.shard_state import make_state_dict, restore_state_dict
from hvdtrain.torch.shards import OptimizerShards
from hvdtrain.torch.table_state import cut_table_state_dict
from hvdtrain.torch.update_settings import UpdateSettings


class LossState:
    """The part of `hvdtrain.torch.optimized_loss.OptimizedLoss` that is saved and loaded."""

    settings: UpdateSettings
    optimizer: WrappedOptimizer
    carried: CarriedState
    hyperparameters: list[ParamGroup]
    local_parts: LocalParts | None

    @property
    def shards(self) -> OptimizerShards | None:
        """This rank's part of the optimizer; None if every rank has all of it."""
        raise NotImplementedError

    def get_parameters(self) -> list[nn.Parameter]:
        """Return the optimizer's parameters, without waiting for gradients."""
        raise NotImplementedError

    def get_state(self) -> StateDict:
        """Return the state of the optimizer."""
        if self.settings.tables is not None:
            parts, whole = set(self.settings.tables.parameters.values()), self.settings.tables.whole_state
        elif (owner := self.shards or self.local_parts) is not None:
            parts, whole = owner.held_values, owner.whole_state
        else:
            parts, whole = set(), {}
        return {
            "optimizer": make_state_dict(self.optimizer, parts, whole),
            "parameters": get_parameter_names(self.optimizer, self.settings.model),
            "settings": self.hyperparameters,
        }

    def load_state(self, state: StateDict, carried: StateDict | None) -> None:
        """Load a state. Raises UserError or torch's own errors for one of other parameters.

        carried: the exchange's part; None if there is none.
        """
        now = get_parameter_names(self.optimizer, self.settings.model)
        own, earlier = align_state(state, now, self.hyperparameters)
        if self.settings.tables is not None:
            own = cut_table_state_dict(self.settings.tables, self.get_parameters(), own)
        restore_state_dict(self.optimizer, self.shards or self.local_parts, own)
        apply_overrides(self.optimizer.param_groups, self.hyperparameters, earlier)
        self.carried.load(carried)
