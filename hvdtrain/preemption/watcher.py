"""Polling a source of preemption notices for as long as the agent runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hvdtrain.preemption.source import Notice, NoticeSource, UnexpectedResponse
from hvdtrain.system.http import InvalidHttpResponse

MAX_POLL_PAUSE = 10.0  # seconds between polls that fail: a notice may come as late as 30 s before the preemption
SILENCE_LIMIT = 30.0  # seconds without any answer after which the source is reported


@dataclass
class SourceWatcher:
    """Polls a source, called `name`, and passes its notices on; reports each kind of failure once."""

    source: NoticeSource
    name: str
    deliver: Callable[[Notice], object]
    _began: float = field(default_factory=time.monotonic)
    _has_answered: bool = False
    _has_warned: bool = False
    _failures: int = 0  # in a row
    _reported: set[str] = field(default_factory=set)

    def watch(self) -> None:
        """Poll for ever."""
        interval = self.source.poll_interval
        while True:
            self.poll_once()
            time.sleep(min(interval * 2.0 ** min(self._failures, 10), max(interval, MAX_POLL_PAUSE)))

    def poll_once(self) -> None:
        """Poll, and pass on the notice if there is one."""
        try:
            notice = self.source.poll()
        except Exception as error:  # whatever it is, the next notice must not be missed
            self._failures += 1
            self._report_failure(error)
            return
        self._has_answered, self._failures = True, 0
        if notice is not None:
            self.deliver(notice)

    def _report_failure(self, error: Exception) -> None:
        kind, location = describe_error_kind(error), self.source.location
        if kind not in self._reported:
            self._reported.add(kind)
            log_agent_message(f"{self.name}: {location}: {kind}; retrying")
        if not (self._has_answered or self._has_warned) and time.monotonic() - self._began > SILENCE_LIMIT:
            self._has_warned = True
            log_agent_message(
                f"{self.name}: {location} has not answered once, so no notice can come from it; check --source"
            )


def describe_error_kind(error: Exception) -> str:
    """Return an error in words, without what differs from one time to the next."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and not isinstance(error, InvalidHttpResponse):
        return error.strerror or type(error).__name__
    if isinstance(error, UnexpectedResponse):
        return str(error)
    return "the answer cannot be parsed"


def log_agent_message(text: str) -> None:
    """Print a message of the agent on standard error."""
    print(f"hvdtrain agent: {text}", file=sys.stderr, flush=True)
