"""What survives a generation: each rank remembers it, and the next generation takes that of the farthest rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvdtrain.diagnosis.report import WorldHistory
from hvdtrain.ledger.writer import LedgerState
from hvdtrain.system.records import encode_record, parse_record
from hvdtrain.training.position import Position
from hvdtrain.training.rows import MetricsRow, rows_from_json, rows_to_json


@dataclass(frozen=True)
class Progress:
    """How far a run has come, besides the model's state."""

    position: Position  # where that state belongs
    recent_rows: Sequence[MetricsRow]  # of metrics.jsonl, the last of which may not be in the file
    ledger: LedgerState
    earlier_worlds: Sequence[WorldHistory]  # of --diagnose
    git_commit: str | None  # as the run has begun
    round: Sequence[object]  # `OpenRound.to_json`

    def to_json(self) -> list[Any]:
        """Return it as plain data."""
        return [
            asdict(self.position),
            rows_to_json(self.recent_rows),
            asdict(self.ledger),
            encode_record(self.earlier_worlds),
            self.git_commit,
            self.round,
        ]

    @staticmethod
    def from_json(data: Sequence[Any]) -> Progress:
        """Return what another rank's `to_json` was called on."""
        position, recent_rows, ledger, earlier_worlds, git_commit, open_round = data
        worlds = parse_record(earlier_worlds, list[WorldHistory])
        rows, ledger_state = rows_from_json(recent_rows), LedgerState(**ledger)
        return Progress(Position(**position), rows, ledger_state, worlds, git_commit, open_round)
