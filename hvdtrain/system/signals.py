"""What all processes of hvdtrain agree on about signals that stop them."""

from __future__ import annotations

import signal

# A launcher, or timeout(1), may send a signal to a process and again to its group, and Slurm sends two: those that come
# within so many seconds after the first one are the same stop.
SAME_STOP_SECONDS = 1.0


def ignores_hangup() -> bool:
    """Whether nohup, or whoever started this process, wants it to outlive its terminal."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
