"""What recipes for elastic runs have in common whose ranks die at chosen points of chosen steps."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hvdtrain.torch import option


@dataclass(kw_only=True)
class Faults:
    """`faults` are POINT:STEP:RANKS, as in gathered:3:1+2, each of which happens once."""

    now: ClassVar[Any]  # the recipe's
    faults: str = option("", "what happens to whom: forward, and what else the recipe injects")
    pause: float = option(0.0, "seconds that each step takes longer")
    fault: str = option("", "a file next to which faults that have happened are noted; its .hold holds the run")

    def suffer(self, point: str) -> None:
        """Die, if that is to happen here."""
        if self.is_due(point):
            os.kill(os.getpid(), signal.SIGKILL)

    def is_due(self, point: str) -> bool:
        for number, text in enumerate(filter(None, self.faults.split(","))):
            kind, step, ranks = text.split(":")
            is_here = kind == point and int(step) == self.now.step and str(self.now.rank) in ranks.split("+")
            note = Path(f"{self.fault}.{number}.{self.now.rank}")
            if is_here and self.now.size > 1 and not note.exists():
                note.touch()
                return True
        return False

    def take_time(self) -> None:
        """Sleep; up to 2 s more while the job holds the run until newcomers have joined."""
        time.sleep(self.pause)
        deadline = time.monotonic() + 2
        while Path(f"{self.fault}.hold").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
