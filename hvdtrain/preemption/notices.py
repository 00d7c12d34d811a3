"""Where preemption notices come from: each source answers, when asked, whether this host is about to go.

The clouds give the time of the end by their own clock. It is compared with the Date of the same answer, not with this
host's clock, so that a clock that is wrong does not make the end come early or late.
"""

from __future__ import annotations

import email.utils
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from email.message import Message
from pathlib import Path
from typing import NamedTuple, Protocol

# The metadata servers are on the link: a proxy must not be asked for them.
DIRECT_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
MAX_RESPONSE_BYTES = 1 << 20
MAX_POLL_PAUSE = 10.0  # between tries: a notice may be as short as 30 s
SILENT_FOR = 30.0  # seconds without any answer after which a source is said to be the wrong one


class Notice(NamedTuple):
    """This host goes: in how many seconds, says who, and why."""

    source: str
    reason: str
    seconds: float


class HttpResponse(NamedTuple):
    """What an HTTP server said."""

    status: int
    text: str
    headers: Message


class UnexpectedResponse(Exception):
    """An answer that is not one of those documented."""


class NoticeSource(Protocol):
    """Where notices come from; `pause` is how many seconds to wait between two questions."""

    poll_interval: float
    location: str

    def poll_notice(self) -> Notice | None:
        """Ask once. Raises what goes wrong, AnswerError or of any other kind."""


class AwsSource:
    """EC2: a spot instance's interruption, two minutes ahead; with `rebalance` also the earlier hint of one."""

    poll_interval = 5.0
    token_seconds = 21600

    def __init__(self, base: str | None, grace: float | None = None, *, rebalance: bool = False) -> None:
        self.location = base or "http://169.254.169.254"
        self.grace = 120.0 if grace is None else grace
        self.reports_rebalance = rebalance
        self._token = ""
        self._renew_at = 0.0

    def poll_notice(self) -> Notice | None:
        answer = self.get_metadata("/latest/meta-data/spot/instance-action")
        if answer.status == 200:
            action = parse_response_fields(answer)
            seconds = seconds_until(action.get("time"), answer, self.grace)
            return Notice("aws", f"spot instance action: {action.get('action', 'unknown')}", seconds)
        # Says only when it was noticed, not when the instance goes.
        if (
            self.reports_rebalance
            and self.get_metadata("/latest/meta-data/events/recommendations/rebalance").status == 200
        ):
            return Notice("aws", "rebalance recommendation", self.grace)
        return None

    def get_metadata(self, path: str) -> HttpResponse:
        """An answer that is 200 or 404, with a token that is renewed before its end and when it is refused."""
        answer = self.get_with_token(path)
        if answer.status == 401:
            self._renew_at = 0.0
            answer = self.get_with_token(path)
        return require_status(answer, 200, 404)

    def get_with_token(self, path: str) -> HttpResponse:
        now = time.monotonic()
        if now >= self._renew_at:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(self.token_seconds)}
            self._token = require_status(
                request_metadata(f"{self.location}/latest/api/token", headers, method="PUT"), 200
            ).text
            self._renew_at = now + 0.9 * self.token_seconds
        return request_metadata(f"{self.location}{path}", {"X-aws-ec2-metadata-token": self._token})


class GcpSource:
    """Compute Engine: the server holds its answer back until the instance is preempted, half a minute ahead."""

    poll_interval = 1.0
    change_wait = 60

    def __init__(self, base: str | None, grace: float | None = None) -> None:
        self.location = base or "http://metadata.google.internal"
        self.grace = 30.0 if grace is None else grace
        self._etag = ""

    def poll_notice(self) -> Notice | None:
        url = f"{self.location}/computeMetadata/v1/instance/preempted"
        if self._etag:  # without the tag of what it is now, a change that came before the question would be waited for
            query = {"wait_for_change": "true", "last_etag": self._etag, "timeout_sec": str(self.change_wait)}
            url += "?" + urllib.parse.urlencode(query)
        answer = require_status(
            request_metadata(url, {"Metadata-Flavor": "Google"}, timeout=self.change_wait + 10), 200
        )
        self._etag = answer.headers.get("ETag") or ""
        return Notice("gcp", "preempted", self.grace) if answer.text.strip().upper() == "TRUE" else None


class AzureSource:
    """Scheduled events: a spot machine's preemption, half a minute ahead, and the termination of a scale set's machine.

    They are not acknowledged: that would make them happen at once.
    """

    poll_interval = 1.0
    event_types = ("Preempt", "Terminate")
    first_timeout = 150.0  # the service is set up by the first question, which may take two minutes

    def __init__(self, base: str | None, host: str) -> None:
        self.location = base or "http://169.254.169.254"
        self._host = host
        self._names: set[str] = set()
        self._has_answered = False

    def poll_notice(self) -> Notice | None:
        url = f"{self.location}/metadata/scheduledevents?api-version=2020-07-01"
        answer = request_metadata(url, {"Metadata": "true"}, timeout=10.0 if self._has_answered else self.first_timeout)
        events = parse_response_fields(require_status(answer, 200)).get("Events")
        self._has_answered = True
        if not isinstance(events, list):
            raise UnexpectedResponse("an answer without Events")
        events = [event for event in events if isinstance(event, dict) and event.get("EventType") in self.event_types]
        # A document may be for all machines of a scale set.
        for event in events:
            if {str(name).lower() for name in event.get("Resources") or []} & self.machine_names():
                # NotBefore is empty once the event has started.
                return Notice(
                    "azure", f"{event['EventType']} event", seconds_until(event.get("NotBefore"), answer, 0.0)
                )
        return None

    def machine_names(self) -> set[str]:
        """What Azure calls this machine, and what its agent does."""
        if not self._names:
            url = f"{self.location}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            answer = require_status(request_metadata(url, {"Metadata": "true"}), 200, 404)
            self._names = {self._host.lower()} | ({answer.text.strip().lower()} if answer.status == 200 else set())
        return self._names


class FileSource:
    """A file that someone makes."""

    poll_interval = 0.5

    def __init__(self, path: Path, grace: float | None = None) -> None:
        self.location = str(path)
        self.grace = 30.0 if grace is None else grace

    def poll_notice(self) -> Notice | None:
        try:
            with Path(self.location).open(errors="replace") as file:
                words = file.readline(200).strip()
        except FileNotFoundError:
            return None
        return Notice("file", words or f"{self.location} is there", self.grace)


def make_notice_source(
    name: str, url: str | None, host: str, file: Path | None, grace: float | None, *, rebalance: bool = False
) -> NoticeSource | None:
    """The source of this name; None for those that are signals."""
    base = url.rstrip("/") if url else None
    if name == "aws":
        return AwsSource(base, grace, rebalance=rebalance)
    if name == "gcp":
        return GcpSource(base, grace)
    if name == "azure":
        return AzureSource(base, host)
    return FileSource(file, grace) if file is not None else None


def watch_source(source: NoticeSource, deliver: Callable[[Notice], object], name: str) -> None:
    """Ask a source for ever and hand on what it says; each kind of failure is said once on standard error."""
    begin, answered, warned, failures = time.monotonic(), False, False, 0
    told: set[str] = set()
    while True:
        try:
            notice = source.poll_notice()
        except Exception as error:  # whatever it is, the next notice must not be missed
            failures += 1
            kind = describe_error_kind(error)
            if kind not in told:
                told.add(kind)
                log_agent_message(f"{name}: {source.location}: {kind}; trying on")
            if not (answered or warned) and time.monotonic() - begin > SILENT_FOR:
                warned = True
                log_agent_message(
                    f"{name}: {source.location} has not answered once: no notice can come from it. Is --source right?"
                )
        else:
            answered, failures = True, 0
            if notice is not None:
                deliver(notice)
        time.sleep(min(source.poll_interval * 2.0 ** min(failures, 10), max(source.poll_interval, MAX_POLL_PAUSE)))


def describe_error_kind(error: Exception) -> str:
    """An error without what differs from one time to the next."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnexpectedResponse):
        return str(error)
    return "an answer that is not understood"


def log_agent_message(text: str) -> None:
    print(f"hvdtrain agent: {text}", file=sys.stderr, flush=True)


def request_metadata(
    url: str, headers: Mapping[str, str], *, method: str = "GET", timeout: float = 5.0
) -> HttpResponse:
    """One question over HTTP; an error status is an answer too. Raises OSError or HTTPException."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with DIRECT_OPENER.open(request, timeout=timeout) as response:
            return HttpResponse(
                response.status, response.read(MAX_RESPONSE_BYTES).decode(errors="replace"), response.headers
            )
    except urllib.error.HTTPError as error:
        with error:
            return HttpResponse(error.code, "", error.headers)


def require_status(answer: HttpResponse, *statuses: int) -> HttpResponse:
    """The answer. Raises AnswerError for another status."""
    if answer.status not in statuses:
        raise UnexpectedResponse(f"HTTP status {answer.status}")
    return answer


def parse_response_fields(answer: HttpResponse) -> dict[str, object]:
    """The JSON object in an answer. Raises AnswerError or ValueError."""
    value = json.loads(answer.text)
    if not isinstance(value, dict):
        raise UnexpectedResponse("an answer that is no JSON object")
    return value


def seconds_until(when: object, answer: HttpResponse, default: float) -> float:
    """How long until a time that an answer gives, by the clock of the server; `default` if it gives none."""
    then, now = parse_unix_time(when), parse_unix_time(answer.headers.get("Date"))
    if then is None:
        return default
    return max(0.0, then - (time.time() if now is None else now))


def parse_unix_time(text: object) -> float | None:
    """A time as HTTP or ISO 8601 writes it; without a zone it is in UTC. None for anything else."""
    if not isinstance(text, str) or not text:
        return None
    for parse in (datetime.fromisoformat, email.utils.parsedate_to_datetime):
        try:
            moment = parse(text.replace("Z", "+00:00"))
        except (ValueError, TypeError, IndexError):
            continue
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return None
