"""The state of a training as bytes: the model, the optimizer, what the exchange carries over, and averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hvdtrain.system.errors import UserError
from hvdtrain.torch.buffers import check_tensors_finite
from hvdtrain.torch.changes import ChangeTracker
from hvdtrain.torch.consistency import check_same_model
from hvdtrain.torch.dealt_tables import DealtTables
from hvdtrain.torch.divided_model import DividedModel
from hvdtrain.torch.ema import AveragedModel
from hvdtrain.torch.hyperparameters import StateDict
from hvdtrain.torch.recipe_state import RecipeState
from hvdtrain.torch.shard_state import gather_whole_state
from hvdtrain.torch.table_state import WholeTable, cut_weights, gather_tables, leave_out_rows
from hvdtrain.torch.tensors import load_module_state, read_tensors, write_tensors
from hvdtrain.torch.update import Updater

ROWS_ELSEWHERE = "rows_elsewhere"  # in a state from which rows of dealt tables are left out


@dataclass(frozen=True)
class TrainingState:
    """All that the trajectory depends on, as bytes and back."""

    recipe_state: RecipeState
    divided: DividedModel
    updater: Updater
    ema: AveragedModel | None
    changes: ChangeTracker
    whole_tables: dict[str, WholeTable] = field(default_factory=dict)  # on rank 0, once gathered and until saved

    @property
    def tables(self) -> DealtTables | None:
        """Embedding tables of which this rank has some rows."""
        return self.updater.tables

    @property
    def model(self) -> nn.Module:
        """The model, of which this rank may have a part."""
        return self.divided.model

    def gather_shards(self) -> None:
        """Let rank 0 have, until it serializes the state, what each rank has a part of; all ranks call this."""
        for shards in self.updater.shards:
            shards.whole_state = gather_whole_state(shards)
        self.divided.gather_state()
        for loss in self.updater.losses:
            if loss.local_parts is not None:
                loss.local_parts.gather_whole_state(self.divided)
        if self.ema is not None:
            self.ema.gather_host_state()
        if self.tables is not None:
            average = {} if self.ema is None else dict(self.ema.module.named_modules())
            self.whole_tables.update(gather_tables(self.tables, list(self.updater.optimizers.values()), average))
            weights = self.tables.parameters
            self.tables.whole_state |= {weights[name]: table.state for name, table in self.whole_tables.items()}

    def serialize(self, carried: Mapping[str, object] | None) -> bytes:
        """Return the state as bytes. carried: what the exchange carries from step to step; None: nothing."""
        self.changes.check_state_finite(self.divided.whole_state)
        if self.ema is not None:
            self.ema.copy_constants(self.model)
        tables = dict(self.whole_tables)
        self.whole_tables.clear()
        weights = {name: table.weight for name, table in tables.items()}
        check_tensors_finite(list(weights.items()))
        whole = {**leave_out_rows(self.tables, self.divided.whole_state or self.model.state_dict()), **weights}
        state: dict[str, object] = {"model": whole, **self.updater.optimizer_state()}
        if carried is not None:
            state["exchange"] = carried
        if self.ema is not None:
            averages = {f"module.{name}": table.average for name, table in tables.items()}
            state["ema"] = leave_out_rows(self.tables, self.ema.state_dict(), "module.") | averages
        if self.divided.holds_part:
            state["part"] = True
        if self.tables is not None and not tables:
            state[ROWS_ELSEWHERE] = True
        if self.recipe_state.exists:
            state["recipe"] = self.recipe_state.collect_values()
        self.divided.whole_state = {}
        return write_tensors(state)

    def serialize_anchor(self) -> bytes:
        """Return this rank's state for ranks that join it; in a round of local steps with the parameters of its start.

        Nobody else is asked: of a model that ranks hold together it is this rank's part.
        """
        with self.updater.rounds.at_anchor(), self.divided.gathering_parts():
            if self.divided.is_divided:
                self.gather_shards()
            return self.serialize(self.updater.local_carried_state())

    def rejoin_round(self, data: bytes, device: torch.device) -> list[str]:
        """Take the buffers, and what the recipe remembers, of what another rank has serialized; return lines to print.

        Parameters and the optimizer's state stay those of this rank's open round.
        """
        state = read_tensors(data, device)
        own = {p: p.detach().clone() for p in self.model.parameters()}
        load_module_state(self.model, state["model"])
        with torch.no_grad():
            for p, value in own.items():
                p.copy_(value)
        carried = state.get("exchange")
        for loss in self.updater.losses:
            loss.carried.load(carried.get(loss.name) if carried and self.updater.several else carried)
        self.updater.rounds.rejoin_round(state.get("rounds"))
        return self._accept_state(state)

    def restore(self, data: bytes, device: torch.device) -> list[str]:
        """Load what `serialize` has returned; return lines to print.

        Raises UserError if it is of another model, optimizer or options.
        """
        model, updater, ema = self.model, self.updater, self.ema
        # A device never holds the whole state of which it has a part.
        has_parts = self.divided.is_divided or updater.shards or self.tables is not None
        state = read_tensors(data, torch.device("cpu") if has_parts else device)
        for part, needed in (("scaler", updater.scaler is not None), ("ema", ema is not None)):
            if needed != (part in state):
                raise UserError(
                    f"the checkpoint has {'no' if needed else 'a'} {part} state: keep the run's options to resume"
                )
        if self.tables is not None:
            parts: list[tuple[str, str, nn.Module]] = [("model", "", model)]
            parts += [] if ema is None else [("ema", "module.", ema)]
            for part, prefix, module in parts:
                cut = cut_weights(self.tables, state[part], prefix)
                state[part] = {**module.state_dict(), **cut} if ROWS_ELSEWHERE in state else cut
        check_same_model(model, state["model"], is_part=state.get("part", False))
        try:
            load_module_state(model, state["model"])
            updater.load_state(state)
            if ema is not None:
                ema.load_average(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"the checkpoint is of another model or optimizer: {reason}") from error
        return self._accept_state(state)

    def _accept_state(self, state: StateDict) -> list[str]:
        """Take what was loaded for unchanged, and load what the recipe remembers; return lines to print."""
        self.changes.accept_loaded_state(self.updater.param_groups)
        self.recipe_state.forget_snapshot()
        line = self.recipe_state.load_values(state.get("recipe"))
        return [line] if line is not None else []
