"""Time limits of tests.

They are there to end what hangs: what does not should reach none of them, however slow or busy the machine is.
"""

from __future__ import annotations

PATIENCE = 4  # times as long as on a quiet machine with two cores, with room to spare


def stretch(seconds: float) -> float:
    """Return the time limit for what takes this many seconds at most on a quiet machine."""
    return PATIENCE * seconds
