"""Who gives no sign of life."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from hvdtrain.elastic.records import Heartbeat


@dataclass
class HeartbeatMonitor:
    """When the others' pulses last changed, by this process's monotonic clock: no clock of theirs counts."""

    last_changes: dict[str, tuple[int, float]] = field(default_factory=dict)
    last_check: float = 0.0

    def find_expired(self, pulses: Mapping[str, Heartbeat], lease: float) -> list[str]:
        """The supervisors that have given no sign of life for so long."""
        now = time.monotonic()
        if now - self.last_check > lease / 2:  # this process was frozen itself: it knows nothing of the others
            self.last_changes.clear()
        self.last_check = now
        for key, pulse in pulses.items():
            if key not in self.last_changes or self.last_changes[key][0] != pulse.beats:
                self.last_changes[key] = (pulse.beats, now)
        return [key for key, (_, since) in self.last_changes.items() if now - since > lease]
