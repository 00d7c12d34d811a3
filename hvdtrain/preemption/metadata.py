"""Asking a cloud's metadata server, and the times that it gives.

The clouds give the time of a preemption by their own clock. It is compared with the Date of the same answer, not with
this host's clock, so that a wrong clock does not make the preemption come early or late.
"""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from hvdtrain.preemption.source import NoticeSource, UnexpectedResponse, source_option
from hvdtrain.system.http import HttpResponse, request_url

METADATA_TIMEOUT = 5.0  # seconds for an answer


def url_option(default: str) -> Any:
    """Return the field `url` with the address of a cloud's metadata server."""
    return source_option(default, "Another metadata server, such as http://localhost:1338.", metavar="BASE")


@dataclass(kw_only=True)
class MetadataSource(NoticeSource):
    """Base of the clouds' sources: `url` is their metadata server."""

    url: str = url_option("")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url!r} does not begin with http:// or https://")
        self.url = self.url.rstrip("/")

    @property
    def location(self) -> str:
        """The metadata server."""
        return self.url

    def request(
        self, path: str, headers: Mapping[str, str], *, method: str = "GET", timeout: float = METADATA_TIMEOUT
    ) -> HttpResponse:
        """Send a request; an error status is an answer too. Raises OSError."""
        return request_url(self.url + path, headers=headers, method=method, timeout=timeout)


def require_status(answer: HttpResponse, *statuses: int) -> HttpResponse:
    """Return the answer. Raises UnexpectedResponse if it has another status."""
    if answer.status not in statuses:
        raise UnexpectedResponse(f"HTTP status {answer.status}")
    return answer


def parse_response_fields(answer: HttpResponse) -> dict[str, object]:
    """Return the JSON object in an answer. Raises UnexpectedResponse or ValueError."""
    value = json.loads(answer.text)
    if not isinstance(value, dict):
        raise UnexpectedResponse("the answer is not a JSON object")
    return value


def seconds_until(when: object, answer: HttpResponse, default: float) -> float:
    """Return the seconds until a time that an answer gives, by the server's clock; `default` if it gives none."""
    then, now = parse_unix_time(when), parse_unix_time(answer.headers.get("Date"))
    if then is None:
        return default
    return max(0.0, then - (time.time() if now is None else now))


def parse_unix_time(text: object) -> float | None:
    """Parse a time as HTTP or ISO 8601 writes it, in UTC unless it names a zone; None for anything else."""
    if not isinstance(text, str) or not text:
        return None
    for parse in (datetime.fromisoformat, email.utils.parsedate_to_datetime):
        try:
            moment = parse(text.replace("Z", "+00:00"))
        except (ValueError, TypeError, IndexError):
            continue
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return None
