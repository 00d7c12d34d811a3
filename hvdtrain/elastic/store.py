"""The board: what the members of an elastic run write for each other, kept by horovodrun's own key-value server.

Facts are written once: who writes first has said it, and who comes later reads that. So any member may propose what
all will do, and all do the same. Pulses are overwritten, each by its own writer, and so is the newest round's number.
"""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from hvdtrain.elastic.records import load_json, parse_fact, parse_heartbeat
from hvdtrain.system import signed_http
from hvdtrain.system.signed_http import SignedClient

FACT_SCOPE, HEARTBEAT_SCOPE, ROUND_SCOPE = "hvdtrain.facts", "hvdtrain.pulses", "hvdtrain.rounds"
STORE_TIMEOUT = 10.0  # seconds for an answer of the server


class StoreUnreachable(OSError):
    """The server does not answer: horovodrun has ended, or its host."""


class KeyValueStore:
    """A client of the key-value server. Keys are words without slashes; values are JSON.

    A value that is not what its key says counts as not written, and is reported once.
    Raises BoardLost wherever the server does not answer.
    """

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port
        self.client = SignedClient(signed_http.read_key())
        self.invalid_keys: set[str] = set()  # keys whose values were not valid

    def put_if_absent(self, key: str, value: Any) -> Any:
        """Write a fact unless it is written already; what stands there then."""
        self._request("PUT", f"/{FACT_SCOPE}/{key}", json.dumps(value).encode())
        return self.get(key)

    def get(self, key: str) -> Any:
        """A fact, or None where nobody has written it."""
        text = self._request("GET", f"/{FACT_SCOPE}/{key}")
        return None if text is None else self._parse_value(key, text, partial(parse_fact, key))

    def get_by_prefix(self, prefix: str) -> dict[str, Any]:
        """The facts whose keys begin with the prefix, by what follows it."""
        found = self._get_texts(FACT_SCOPE, prefix)
        parsed = {key: self._parse_value(key, text, partial(parse_fact, key)) for key, text in found.items()}
        return {key[len(prefix) :]: value for key, value in parsed.items() if value is not None}

    def heartbeat(self, key: str, value: Any) -> None:
        """Overwrite a pulse."""
        self._request("PUT", f"/{HEARTBEAT_SCOPE}/{key}", json.dumps(value).encode())

    def get_heartbeats(self) -> dict[str, Any]:
        found = self._get_texts(HEARTBEAT_SCOPE, "")
        parsed = {key: self._parse_value(key, text, parse_heartbeat) for key, text in found.items()}
        return {key: value for key, value in parsed.items() if value is not None}

    def get_newest_round(self) -> int:
        """The newest of horovodrun's rounds of assignment that all slots were called to; 0: there was none."""
        text = self._request("GET", f"/{ROUND_SCOPE}/newest")
        return self._parse_value("newest", text, int) or 0 if text is not None else 0

    def announce_round(self, number: int) -> None:
        """Call all slots to a round of assignment, which each answers by `assignment`."""
        self._request("PUT", f"/{ROUND_SCOPE}/newest", json.dumps(number).encode())

    def wait_for_assignment(self, host: str, local_rank: int) -> tuple[int, int]:
        """This slot's rank in horovodrun's own list, and the list's length; (-1, ...) where it is in it no more.

        Waits for all other slots of the list.
        """
        text = self._request("GET", f"/rank_and_size/{host}:{local_rank}", timeout=None)
        rank, size, *_ = (text or b"-1,-1").split(b",")
        return int(rank), int(size)

    def _get_texts(self, scope: str, prefix: str) -> dict[str, str]:
        """The texts of the values whose keys begin with the prefix."""
        found = self._parse_value(scope, self._request("GET", f"/{scope}/{prefix}*") or b"{}", load_json)
        texts = found if isinstance(found, dict) else {}
        return {key: text for key, text in texts.items() if key.startswith(prefix) and isinstance(text, str)}

    def _parse_value(self, key: str, text: bytes | str, parse: Callable[[Any], Any]) -> Any:
        """What a text says; None if it is not valid, which is reported once."""
        try:
            return parse(text)
        except ValueError as error:
            if key not in self.invalid_keys:
                print(f"hvdtrain: dropped an invalid value of {key!r:.100}: {error}", file=sys.stderr)
            self.invalid_keys.add(key)
            return None

    def _request(
        self, method: str, path: str, body: bytes | None = None, timeout: float | None = STORE_TIMEOUT
    ) -> bytes | None:
        """The answer's body, None for 404."""
        try:
            status, text = self.client.request(self.address, self.port, method, path, body or b"", timeout)
        except (OSError, http.client.HTTPException) as error:
            raise StoreUnreachable(f"horovodrun at {self.address}:{self.port} does not answer: {error}") from error
        if status not in (200, 404):
            raise StoreUnreachable(f"horovodrun at {self.address}:{self.port} answers {status} to {method} {path}")
        return text if status == 200 else None
