"""A regression in float64 whose ranks are killed at points that are scripted, by `kills`.

1@5          rank 1 dies in `score` of step 5, which no rank commits
1@5.reports  after step 5, before the exchange of the round that ends there
1@5.sums     in that exchange, when this rank has the sums and others may not
1@5.outer    when it has finished the exchange
1@5.cut      does not die, but acts as if the world had broken before it had the sums
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hvdtrain.comm.collectives import PeersLost
from hvdtrain.torch import option, rounds
from tests.ranks.local_recipes import Curve, CurveAdam


@dataclass(kw_only=True)
class Lossy(Curve):
    """A regression with a small network, with losses."""

    kills: str = option("", "RANK@STEP[.POINT] ...: who dies, and where")
    fault: str = option("", "a file; what begins with its name tells which kills are done")
    newcomers: bool = option(False, "whether workers come that are started again")
    epochs: int = 2
    momentum: float = 0.9

    def model(self) -> nn.Module:
        while list(Path(self.fault).parent.glob("fault.done.*")) and not self.newcomers:
            time.sleep(1)  # until the run has ended
        for point, name in (("reports", "_compare_reports"), ("sums", "finish_exchange"), ("outer", "step_outer")):
            owner: Any = rounds if point == "sums" else rounds.Rounds
            self.put_before(owner, name, point)
        return super().model()

    def put_before(self, owner: Any, name: str, point: str) -> None:
        inner = getattr(owner, name)

        def hooked(*args: Any) -> Any:
            self.take_kill(f"{self.now.rank}@{self.now.step + 1}.{point}")
            if point == "sums" and self.is_due(f"{self.now.rank}@{self.now.step + 1}.cut"):
                raise PeersLost("on purpose")
            return inner(*args)

        setattr(owner, name, hooked)

    def score(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        if model.training and self.now.training:
            self.take_kill(f"{self.now.rank}@{self.now.step + 1}")
        return super().score(model, batch)

    def take_kill(self, kill: str) -> None:
        if self.is_due(kill):
            os.kill(os.getpid(), signal.SIGKILL)

    def is_due(self, kill: str) -> bool:
        """Whether this comes now; each comes once."""
        done = Path(f"{self.fault}.done.{kill}")
        if kill not in self.kills.split() or done.exists():
            return False
        done.touch()
        return True


@dataclass(kw_only=True)
class LossyAdam(Lossy, CurveAdam):
    """The same with batch norm, dropout and Adam."""
