"""Notices of Google Compute Engine, from its metadata server."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field

from hvdtrain.preemption.metadata import MetadataSource, require_status, url_option
from hvdtrain.preemption.source import Notice, notice_source

PREEMPTED_PATH = "/computeMetadata/v1/instance/preempted"


@notice_source("gcp")
@dataclass(kw_only=True)
class GcpSource(MetadataSource):
    """Google Compute Engine: a preemption, half a minute ahead."""

    poll_interval = 1.0
    change_wait = 60  # seconds that the server holds its answer back if nothing changes

    url: str = url_option("http://metadata.google.internal")
    _etag: str = field(default="", init=False)

    def poll(self) -> Notice | None:
        path = PREEMPTED_PATH
        if self._etag:  # without the tag of its present value, a change before the request would be waited for
            query = {"wait_for_change": "true", "last_etag": self._etag, "timeout_sec": str(self.change_wait)}
            path += "?" + urllib.parse.urlencode(query)
        answer = require_status(self.request(path, {"Metadata-Flavor": "Google"}, timeout=self.change_wait + 10), 200)
        self._etag = answer.headers.get("ETag") or ""
        return Notice("preempted", self.grace) if answer.text.strip().upper() == "TRUE" else None
