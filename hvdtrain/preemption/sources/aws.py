"""Notices of Amazon EC2, from its instance metadata service (IMDSv2)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from hvdtrain.preemption.metadata import (
    MetadataSource,
    parse_response_fields,
    require_status,
    seconds_until,
    url_option,
)
from hvdtrain.preemption.source import Notice, grace_option, notice_source, source_option
from hvdtrain.system.http import HttpResponse

TOKEN_PATH = "/latest/api/token"
ACTION_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"


@notice_source("aws")
@dataclass(kw_only=True)
class AwsSource(MetadataSource):
    """Amazon EC2: a spot instance's interruption, two minutes ahead."""

    poll_interval = 5.0
    token_seconds = 21600

    url: str = url_option("http://169.254.169.254")
    grace: float = grace_option(120.0)
    rebalance: bool = source_option(False, "Leave at its earlier recommendation to rebalance, too.")
    _token: str = field(default="", init=False)
    _renew_at: float = field(default=0.0, init=False)

    def poll(self) -> Notice | None:
        answer = self._get(ACTION_PATH)
        if answer.status == 200:
            action = parse_response_fields(answer)
            seconds = seconds_until(action.get("time"), answer, self.grace)
            return Notice(f"spot instance action: {action.get('action', 'unknown')}", seconds)
        # A recommendation says when it was made, not when the instance is interrupted.
        if self.rebalance and self._get(REBALANCE_PATH).status == 200:
            return Notice("rebalance recommendation", self.grace)
        return None

    def _get(self, path: str) -> HttpResponse:
        """Return an answer with status 200 or 404; its token is renewed before it ends and when it is refused."""
        answer = self._get_with_token(path)
        if answer.status == 401:
            self._renew_at = 0.0
            answer = self._get_with_token(path)
        return require_status(answer, 200, 404)

    def _get_with_token(self, path: str) -> HttpResponse:
        now = time.monotonic()
        if now >= self._renew_at:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(self.token_seconds)}
            self._token = require_status(self.request(TOKEN_PATH, lifetime, method="PUT"), 200).text
            self._renew_at = now + 0.9 * self.token_seconds
        return self.request(path, {"X-aws-ec2-metadata-token": self._token})
