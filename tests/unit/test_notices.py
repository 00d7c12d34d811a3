"""Preemption notices, from servers that answer as the clouds document it."""

from __future__ import annotations

import json
import threading
import time
import urllib.parse
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.preemption import watcher
from hvdtrain.preemption.metadata import parse_unix_time
from hvdtrain.preemption.source import Notice, NoticeSource, UnexpectedResponse
from hvdtrain.preemption.sources.aws import AwsSource
from hvdtrain.preemption.sources.azure import AzureSource
from hvdtrain.preemption.sources.file import FileSource
from hvdtrain.preemption.sources.gcp import GcpSource
from hvdtrain.preemption.watcher import SourceWatcher
from tests.unit.http_server import serving

Answer = tuple[int, dict[str, str], str]


class Delivered(Exception):
    """Ends `SourceWatcher.watch`, which otherwise never does."""


def first_notice(source: NoticeSource, count: int = 1) -> list[Notice]:
    """The first notices that a watched source delivers."""
    source.poll_interval = 0.01
    found: list[Notice] = []

    def deliver(notice: Notice) -> None:
        found.append(notice)
        if len(found) == count:
            raise Delivered

    with pytest.raises(Delivered):
        SourceWatcher(source, "test", deliver).watch()
    return found


class AwsServer:
    """IMDSv2: no answer without a token that it gave and that is still good; 404 where there is nothing to say."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.first: list[int] = []  # statuses of the first answers
        self.pages: dict[str, Any] = {}
        self.calls_until_action = 0
        self.date: dict[str, str] = {}

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        self.asked.append(f"{method} {path}")
        if self.first:
            return self.first.pop(0), {}, ""
        if path == "/latest/api/token":
            if method != "PUT":
                return 405, {}, ""
            if not 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600:
                return 400, {}, ""
            self.tokens.add(f"token{len(self.asked)}")
            return 200, {}, f"token{len(self.asked)}"
        if headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return 401, {}, ""
        self.calls_until_action -= 1
        page = self.pages.get(path) if self.calls_until_action < 0 else None
        return (404, {}, "Not Found") if page is None else (200, self.date, json.dumps(page))


ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def test_aws_says_nothing_and_then_when_it_ends() -> None:
    server = AwsServer()
    server.pages[ACTION] = {"action": "terminate", "time": iso(time.time() + 120)}
    server.calls_until_action = 2
    with serving(server) as url:
        [notice] = first_notice(AwsSource(url=url))
    assert notice.reason == "spot instance action: terminate"
    assert 110 < notice.seconds <= 120.5
    assert server.asked == ["PUT /latest/api/token", *[f"GET {ACTION}"] * 3]


@pytest.mark.parametrize("skew", [-86400, 86400])
def test_aws_time_is_by_the_clock_of_aws(skew: float) -> None:
    server = AwsServer()
    server.date = {"Date": formatdate(time.time() + skew, usegmt=True)}
    server.pages[ACTION] = {"action": "stop", "time": iso(time.time() + skew + 60)}
    with serving(server) as url:
        [notice] = first_notice(AwsSource(url=url))
    assert 55 < notice.seconds <= 61


def test_aws_token_is_renewed_when_refused_and_before_its_end() -> None:
    server = AwsServer()
    with serving(server) as url:
        source = AwsSource(url=url)
        assert source.poll() is None
        server.tokens.clear()
        assert source.poll() is None
        assert server.asked.count("PUT /latest/api/token") == 2
        source.token_seconds = 1
        server.tokens.clear()
        assert source.poll() is None
        time.sleep(1)
        assert source.poll() is None
    assert server.asked.count("PUT /latest/api/token") == 4
    assert server.asked.count(f"GET {ACTION}") == 6  # two of them refused


@pytest.mark.parametrize("rebalance", [False, True])
def test_aws_rebalance_recommendation_counts_if_asked_for(rebalance: bool) -> None:
    server = AwsServer()
    server.pages[REBALANCE] = {"noticeTime": iso(time.time())}
    with serving(server) as url:
        notice = AwsSource(url=url, rebalance=rebalance).poll()
    assert notice == (Notice("rebalance recommendation", 120.0) if rebalance else None)


def test_aws_without_a_time_gives_two_minutes() -> None:
    server = AwsServer()
    server.pages[ACTION] = {"action": "hibernate", "time": "soon"}
    with serving(server) as url:
        assert AwsSource(url=url).poll() == Notice("spot instance action: hibernate", 120.0)
        assert AwsSource(url=url, grace=7.0).poll() == Notice("spot instance action: hibernate", 7.0)


def test_failures_are_tried_again_and_said_once_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    server = AwsServer()
    server.first = [500, 500, 503, 500]
    server.pages[ACTION] = {"action": "terminate", "time": iso(time.time() + 120)}
    with serving(server) as url:
        first_notice(AwsSource(url=url))
    assert capsys.readouterr().err.splitlines() == [
        f"hvdtrain agent: test: {url}: HTTP status 500; retrying",
        f"hvdtrain agent: test: {url}: HTTP status 503; retrying",
    ]


def test_a_source_that_never_answered_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher, "SILENCE_LIMIT", 0.0)

    class Refused(AwsSource):
        tries = 0

        def poll(self) -> Notice | None:
            self.tries += 1
            return super().poll() if self.tries < 4 else Notice("at last", 1.0)

    with serving(AwsServer()) as url:
        pass  # it is gone again: nobody listens there
    first_notice(Refused(url=url))
    refused, silent = capsys.readouterr().err.splitlines()
    assert refused == f"hvdtrain agent: test: {url}: Connection refused; retrying"
    assert silent == (
        f"hvdtrain agent: test: {url} has not answered once, so no notice can come from it; check --source"
    )


def test_an_answer_that_is_nonsense_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    server = AwsServer()
    pages = iter(["[1]", '{"half', '{"action": "stop"}'])

    def reply(method: str, path: str, headers: Mapping[str, str]) -> Answer:
        status, found, body = server(method, path, headers)
        return (200, {}, next(pages)) if path == ACTION else (status, found, body)

    with serving(reply) as url:
        [notice] = first_notice(AwsSource(url=url))
    assert notice.reason == "spot instance action: stop"
    assert len(capsys.readouterr().err.splitlines()) == 2


class GcpServer:
    """Holds back the answer to wait_for_change until the value is another than that of last_etag, or time is up."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.value, self.etag = "FALSE", "411261ca6c9e4181"
        self.asked: list[dict[str, str]] = []

    def preempt(self) -> None:
        with self.changed:
            self.value, self.etag = "TRUE", "fe8a2b1c7d4e5f60"
            self.changed.notify_all()

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        url = urllib.parse.urlparse(path)
        if headers.get("Metadata-Flavor") != "Google":
            return 403, {}, ""
        if url.path != "/computeMetadata/v1/instance/preempted":
            return 404, {}, ""
        query = dict(urllib.parse.parse_qsl(url.query))
        self.asked.append(query)
        with self.changed:
            if query.get("wait_for_change") == "true":
                self.changed.wait_for(lambda: self.etag != query.get("last_etag"), float(query.get("timeout_sec", 60)))
            return 200, {"ETag": self.etag, "Metadata-Flavor": "Google"}, self.value


def test_gcp_waits_for_the_change() -> None:
    server = GcpServer()
    timer = threading.Timer(0.5, server.preempt)
    with serving(server) as url:
        timer.start()
        begin = time.monotonic()
        assert first_notice(GcpSource(url=url)) == [Notice("preempted", 30.0)]
        assert 0.4 < time.monotonic() - begin < 10
    timer.join()
    assert [query.get("last_etag") for query in server.asked] == [None, "411261ca6c9e4181"]


def test_gcp_waits_again_when_nothing_changed() -> None:
    server = GcpServer()
    with serving(server) as url:
        source = GcpSource(url=url)
        source.change_wait = 1
        assert [source.poll(), source.poll()] == [None, None]
        server.preempt()
        assert source.poll() is not None


def test_gcp_preempted_before_the_agent_began() -> None:
    server = GcpServer()
    server.preempt()
    with serving(server) as url:
        assert GcpSource(url=url, grace=120.0).poll() == Notice("preempted", 120.0)


class AzureServer:
    """The first answer takes long; events name the machines that they are for."""

    def __init__(self, *events: dict[str, Any], slow: float = 0.0) -> None:
        self.events, self.slow, self.posted = list(events), slow, 0

    def __call__(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        if headers.get("Metadata") != "true":
            return 400, {}, ""
        self.posted += method == "POST"
        if path == "/metadata/scheduledevents?api-version=2020-07-01":
            slow, self.slow = self.slow, 0.0
            time.sleep(slow)
            return 200, {}, json.dumps({"DocumentIncarnation": 1, "Events": self.events})
        if path == "/metadata/instance/compute/name?api-version=2021-02-01&format=text":
            return 200, {}, "vmss_7"
        return 404, {}, ""


def event(kind: str, not_before: str, *resources: str) -> dict[str, Any]:
    return {
        "EventId": "C1BF8322-4CBF-4FC4-9C45-B40CF3106D0E",
        "EventStatus": "Scheduled" if not_before else "Started",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": list(resources),
        "NotBefore": not_before,
        "Description": "",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    }


@pytest.mark.parametrize("form", [lambda when: formatdate(when, usegmt=True), iso])
@pytest.mark.parametrize("kind", ["Preempt", "Terminate"])
def test_azure_event_for_this_machine(kind: str, form: Any) -> None:
    server = AzureServer(event("Preempt", form(time.time()), "vmss_1"), event(kind, form(time.time() + 30), "VMSS_7"))
    with serving(server) as url:
        notice = AzureSource(url=url, host="worker").poll()
    assert notice is not None
    assert notice.reason == f"{kind} event"
    assert 25 < notice.seconds <= 31
    assert server.posted == 0  # an acknowledgement would make it happen at once


def test_azure_event_that_has_started_leaves_no_time() -> None:
    with serving(AzureServer(event("Preempt", "", "vmss_7"))) as url:
        assert AzureSource(url=url, host="worker").poll() == Notice("Preempt event", 0.0)


def test_azure_events_for_others_or_of_other_kinds() -> None:
    soon = formatdate(time.time() + 30, usegmt=True)
    events = [event("Preempt", soon, "vmss_1", "vmss_17"), event("Freeze", soon, "vmss_7"), event("Preempt", soon)]
    with serving(AzureServer(*events)) as url:
        assert AzureSource(url=url, host="worker").poll() is None


def test_azure_may_take_long_to_answer_first() -> None:
    server = AzureServer(event("Preempt", "", "worker"), slow=0.7)
    with serving(server) as url:
        impatient = AzureSource(url=url, host="worker")
        impatient.first_timeout = 0.2
        with pytest.raises(OSError, match="timed out"):
            impatient.poll()
        server.slow = 0.7
        assert AzureSource(url=url, host="worker").poll() is not None
    assert AzureSource.first_timeout > 120


def test_azure_answer_without_events() -> None:
    with (
        serving(lambda *_: (200, {}, "{}")) as url,
        pytest.raises(UnexpectedResponse, match="the answer has no list of Events"),
    ):
        AzureSource(url=url, host="worker").poll()


def test_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serving(GcpServer()) as url:
        assert GcpSource(url=url).poll() is None


def test_notice_file_gives_its_first_line_as_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    source = FileSource(notice_file=path, grace=12.0)
    assert source.poll() is None
    path.touch()
    assert source.poll() == Notice(f"{path} exists", 12.0)
    path.write_text("rack 7 is moved\nat noon\n")
    assert source.poll() == Notice("rack 7 is moved", 12.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2017-09-18T08:22:00Z", 1505722920.0),
        ("2017-09-18T08:22:00", 1505722920.0),
        ("Mon, 18 Sep 2017 08:22:00 GMT", 1505722920.0),
        ("", None),
        ("soon", None),
        (None, None),
        (12, None),
    ],
)
def test_times_of_notices_are_parsed_to_unix_seconds(text: object, expected: float | None) -> None:
    assert parse_unix_time(text) == expected
