"""Notices of Microsoft Azure: Scheduled Events of its instance metadata service."""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdtrain.preemption.metadata import (
    METADATA_TIMEOUT,
    MetadataSource,
    parse_response_fields,
    require_status,
    seconds_until,
    url_option,
)
from hvdtrain.preemption.source import Notice, UnexpectedResponse, notice_source

EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
NAME_PATH = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
HEADERS = {"Metadata": "true"}
EVENT_TYPES = ("Preempt", "Terminate")


@notice_source("azure")
@dataclass(kw_only=True)
class AzureSource(MetadataSource):
    """Microsoft Azure: a spot machine's preemption, half a minute ahead, or a scale set's removal of a machine.

    Events are not acknowledged: an acknowledgement would make them happen at once.
    """

    poll_interval = 1.0
    first_timeout = 150.0  # seconds: the first request sets the service up, which may take two minutes

    url: str = url_option("http://169.254.169.254")
    _names: set[str] = field(default_factory=set, init=False)
    _has_answered: bool = field(default=False, init=False)

    def poll(self) -> Notice | None:
        timeout = 2 * METADATA_TIMEOUT if self._has_answered else self.first_timeout
        answer = self.request(EVENTS_PATH, HEADERS, timeout=timeout)
        events = parse_response_fields(require_status(answer, 200)).get("Events")
        self._has_answered = True
        if not isinstance(events, list):
            raise UnexpectedResponse("the answer has no list of Events")
        events = [event for event in events if isinstance(event, dict) and event.get("EventType") in EVENT_TYPES]
        # The events of all machines of a scale set may come together.
        for event in events:
            if {str(name).lower() for name in event.get("Resources") or []} & self._machine_names():
                # NotBefore is empty once the event has started.
                return Notice(f"{event['EventType']} event", seconds_until(event.get("NotBefore"), answer, 0.0))
        return None

    def _machine_names(self) -> set[str]:
        """Return the names that Azure and the agent have for this machine, in lower case."""
        if not self._names:
            answer = require_status(self.request(NAME_PATH, HEADERS), 200, 404)
            self._names = {self.host.lower()} | ({answer.text.strip().lower()} if answer.status == 200 else set())
        return self._names
