"""HTTP requests: each has a time limit, and none goes through a proxy.

All servers that hvdtrain asks are near: a rank of the run, horovodrun, a metadata server on this host's own link, the
API of the cluster that this host is in. A proxy named in the environment (http_proxy) would not reach them, or would be
shown what is meant for them. So requests are always direct; redirects are not followed, as they carry credentials.

    request_url(url)                     a request to a server by its URL, with TLS for https
    request_signed(client, server, ...)  a request to a process of this run (hvdtrain.system.signed_http)
"""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import NamedTuple

from hvdtrain.system.processes import Deadline
from hvdtrain.system.signed_http import SignedClient

MAX_RESPONSE_BYTES = 1 << 20
READ_SIZE = 1 << 16  # bytes


class InvalidHttpResponse(OSError):
    """What a server answered is not HTTP."""


class HttpResponse(NamedTuple):
    """An answer of an HTTP server; its text is "" if the status is not one of success."""

    status: int
    text: str
    headers: Message


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirection an answer like any other."""

    def redirect_request(self, *_: object) -> None:
        """Return no request, so that none is sent."""


def request_url(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
    timeout: float,
    ca_file: Path | None = None,
    max_bytes: int = MAX_RESPONSE_BYTES,
) -> HttpResponse:
    """Send a request and return the answer; an error status is an answer too.

    Args:
        url: beginning with http:// or https://.
        headers: more headers.
        method: GET, or PUT with an empty body.
        timeout: seconds for the connection and for each piece of the answer, and twice that for all of it.
        ca_file: the certificates of those who may sign the server's; None: the system's.
        max_bytes: of the answer that are read.

    Raises:
        OSError: the server cannot be reached, does not answer in time, or answers without HTTP.
    """
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({}), _NoRedirects()]
    if url.startswith("https:"):
        handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)))
    request = urllib.request.Request(url, headers=dict(headers or {}), method=method)
    deadline = Deadline(2 * timeout)
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout) as response:
            body = _read_body(response, deadline, max_bytes)
            return HttpResponse(response.status, body.decode(errors="replace"), response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return HttpResponse(error.code, "", error.headers)
    except urllib.error.URLError as error:
        raise (error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason))) from None
    except http.client.HTTPException as error:
        raise InvalidHttpResponse(f"{url} does not answer by HTTP: {error!r}") from error


def _read_body(response: http.client.HTTPResponse, deadline: Deadline, max_bytes: int) -> bytes:
    """Return the body, cut off after `max_bytes`. Raises TimeoutError."""
    body = b""
    while len(body) < max_bytes and (data := response.read1(READ_SIZE)):
        body += data
        if deadline.expired:
            raise TimeoutError(f"no whole answer within {deadline.seconds:g} s")
    return body[:max_bytes]


def request_signed(
    client: SignedClient, server: tuple[str, int], method: str, path: str, body: bytes = b"", *, timeout: float | None
) -> tuple[int, bytes]:
    """Send a signed request to a process of this run and return the answer's status and body.

    Args:
        client: has the run's secret.
        server: its address and port.
        method: GET, PUT or DELETE.
        path: beginning with a slash.
        body: of a PUT.
        timeout: seconds for the connection and for each piece of the answer; None: no limit.

    Raises:
        NotSigned: the answer is not signed with the run's secret.
        OSError: the server cannot be reached, does not answer in time, or answers without HTTP.
    """
    try:
        return client.request(*server, method, path, body, timeout)
    except http.client.HTTPException as error:
        raise InvalidHttpResponse(f"{server[0]}:{server[1]} does not answer by HTTP: {error!r}") from error
