"""Who gives no sign of life."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Watch:
    """When the others' pulses last changed, by this process's monotonic clock: no clock of theirs counts."""

    seen: dict[str, tuple[int, float]] = field(default_factory=dict)
    looked: float = 0.0

    def look(self, pulses: Mapping[str, Any], lease: float) -> list[str]:
        """The supervisors that have given no sign of life for so long."""
        now = time.monotonic()
        if now - self.looked > lease / 2:  # this process was frozen itself: it knows nothing of the others
            self.seen.clear()
        self.looked = now
        for key, pulse in pulses.items():
            if key not in self.seen or self.seen[key][0] != pulse["beats"]:
                self.seen[key] = (pulse["beats"], now)
        return [key for key, (_, since) in self.seen.items() if now - since > lease]
