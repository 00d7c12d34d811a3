"""Notices that are signals to the agent."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from hvdtrain.preemption.source import NoticeSource, notice_source


@notice_source("signal")
@dataclass(kw_only=True)
class SignalSource(NoticeSource):
    """A signal: SIGTERM or SIGUSR1 to the agent is the notice, a second SIGTERM ends the agent."""

    notice_signals = (signal.SIGTERM, signal.SIGUSR1)
