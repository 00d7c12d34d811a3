"""How a supervisor ends the run for all, or reports that its own slot fails."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from hvdtrain import messages
from hvdtrain.elastic.board import Board
from hvdtrain.elastic.places import Slot


@dataclass(frozen=True)
class Endings:
    """What one slot's supervisor, called `name` on the board, may say of the end."""

    board: Board
    name: str
    slot: Slot

    def end_run(self, code: int, error: str) -> int:
        """End the run for all with an exit code, and report why, unless it has ended already; the run's exit code.

        error: "" for a stop.
        """
        mine = {"code": code, "error": error, "by": self.name}
        verdict = self.board.propose("verdict", mine)
        if verdict == mine and error:
            self.report_failure(code, error, ends=True)
        elif verdict == mine:
            messages.send("finished", rank=self.slot.local_rank, code=code)
        return int(verdict["code"])

    def report_failure(self, code: int, error: str, *, ends: bool) -> None:
        """Report to the launcher why this slot fails. ends: and the run with it, whoever else is there."""
        about = {"rank": self.slot.local_rank, "host": self.slot.host, "pid": os.getpid()}
        messages.send("failed", **about, code=code, error=error, traceback="", ends=ends)
        if not messages.launched():
            print(f"hvdtrain: error: {error}", file=sys.stderr, flush=True)
