"""Asking a cloud's metadata server, and the times that it gives.

The clouds give the time of a preemption by their own clock. It is compared with the Date of the same answer, not with
this host's clock, so that a wrong clock does not make the preemption come early or late.
"""

from __future__ import annotations

import email.utils
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from typing import Any, NamedTuple

from hvdtrain.preemption.source import NoticeSource, UnexpectedResponse, source_option

# A metadata server is on this host's own link: no proxy reaches it.
DIRECT_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
MAX_RESPONSE_BYTES = 1 << 20
METADATA_TIMEOUT = 5.0  # seconds for an answer


class HttpResponse(NamedTuple):
    """An answer of an HTTP server."""

    status: int
    text: str
    headers: Message


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
        """Send a request; an error status is an answer too. Raises OSError or HTTPException."""
        request = urllib.request.Request(self.url + path, headers=dict(headers), method=method)
        try:
            with DIRECT_OPENER.open(request, timeout=timeout) as response:
                text = response.read(MAX_RESPONSE_BYTES).decode(errors="replace")
                return HttpResponse(response.status, text, response.headers)
        except urllib.error.HTTPError as error:
            with error:
                return HttpResponse(error.code, "", error.headers)


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
