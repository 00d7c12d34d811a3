"""The key-value store of an elastic run: what its members write for each other, kept by horovodrun's own server.

scope             written                    what
hvdtrain.facts    once, by the first writer  hvdtrain.elastic.records.Fact: who comes later reads what it wrote, so
                                             any member may propose what all will do, and all do the same
hvdtrain.pulses   again and again, by one    a Heartbeat of each supervisor
hvdtrain.rounds   again and again            `newest`: the number of horovodrun's newest round of assignment
rank_and_size     by horovodrun              this slot's rank in horovodrun's own list
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from hvdtrain.elastic.records import Fact, Heartbeat, dump_record, load_json
from hvdtrain.system import signed_http
from hvdtrain.system.errors import RunError
from hvdtrain.system.http import request_signed
from hvdtrain.system.limits import GenerationLimits
from hvdtrain.system.records import parse_record
from hvdtrain.system.signed_http import SignedClient

T = TypeVar("T")
V = TypeVar("V")

FACT_SCOPE, HEARTBEAT_SCOPE, ROUND_SCOPE = "hvdtrain.facts", "hvdtrain.pulses", "hvdtrain.rounds"


class StoreUnreachable(OSError):
    """The server does not answer: horovodrun has ended, or its host."""


class KeyValueStore:
    """A client of the key-value server. Keys are words without slashes; values are JSON.

    A value that is not valid counts as not written, and is reported once.
    All methods raise StoreUnreachable if the server does not answer.
    """

    def __init__(self, address: str, port: int) -> None:
        self.server, self.location = (address, port), f"{address}:{port}"
        self.client = SignedClient(signed_http.read_key())
        self.invalid_keys: set[str] = set()  # that were reported

    def put_if_absent(self, fact: Fact[T], value: T) -> T:
        """Write a fact unless it is written already; return what is written then.

        Raises:
            RunError: what is written already is not valid.
        """
        self.put(fact, value)
        return self.require(fact)

    def put(self, fact: Fact[T], value: T) -> None:
        """Write a fact unless it is written already; for one whose other writers, if there are any, mean the same."""
        self._request("PUT", f"/{FACT_SCOPE}/{fact.key}", dump_record(value))

    def get(self, fact: Fact[T]) -> T | None:
        """Return a fact, or None if it is not written."""
        text = self._request("GET", f"/{FACT_SCOPE}/{fact.key}")
        return None if text is None else self._parse(fact.key, text, partial(fact.parse, fact.key))

    def require(self, fact: Fact[T]) -> T:
        """Return a fact that is written. Raises RunError if it is not, or not valid."""
        written = self.get(fact)
        if written is None:
            raise RunError(f"{fact.key!r} is missing in the run's key-value store, or is not valid there")
        return written

    def get_all(self, facts: Fact[T]) -> dict[str, T]:
        """Return all facts of a kind, or those that `facts.of` restricts it to, by the rest of their keys."""
        prefix = f"{facts.key}-"
        found = {}
        for key, text in self._get_texts(FACT_SCOPE, prefix).items():
            value = self._parse(key, text, partial(facts.parse, key))
            if value is not None:
                found[key.removeprefix(prefix)] = value
        return found

    def send_heartbeat(self, supervisor: str, heartbeat: Heartbeat) -> None:
        """Overwrite a supervisor's heartbeat."""
        self._request("PUT", f"/{HEARTBEAT_SCOPE}/{supervisor}", dump_record(heartbeat))

    def get_heartbeats(self) -> dict[str, Heartbeat]:
        """Return the newest heartbeat of each supervisor."""
        texts = self._get_texts(HEARTBEAT_SCOPE, "")
        parsed = {key: self._parse(key, text, _parse_heartbeat) for key, text in texts.items()}
        return {key: value for key, value in parsed.items() if value is not None}

    def get_newest_round(self) -> int:
        """Return the number of horovodrun's newest round of assignment; 0 if there was none."""
        text = self._request("GET", f"/{ROUND_SCOPE}/newest")
        return 0 if text is None else self._parse("newest", text, int) or 0

    def announce_round(self, number: int) -> None:
        """Call all slots to a round of assignment, which each answers by `wait_for_assignment`."""
        self._request("PUT", f"/{ROUND_SCOPE}/newest", dump_record(number))

    def wait_for_assignment(self, host: str, local_rank: int) -> tuple[int, int]:
        """Return a slot's rank in horovodrun's own list, -1 if it is not in it any more, and the list's length.

        Waits until all slots of the list have asked.
        """
        text = self._request("GET", f"/rank_and_size/{host}:{local_rank}", timeout=None)
        rank, size, *_ = (text or b"-1,-1").split(b",")
        return int(rank), int(size)

    def _get_texts(self, scope: str, prefix: str) -> dict[str, str]:
        """Return the values whose keys begin with the prefix, as they were written."""
        found = self._parse(scope, self._request("GET", f"/{scope}/{prefix}*") or b"{}", load_json)
        texts = found if isinstance(found, dict) else {}
        return {key: text for key, text in texts.items() if key.startswith(prefix) and isinstance(text, str)}

    def _parse(self, key: str, text: bytes | str, parse: Callable[[bytes | str], V]) -> V | None:
        """Return a value, or None if it is not valid, which is reported once."""
        try:
            return parse(text)
        except ValueError as error:
            if key not in self.invalid_keys:
                print(f"hvdtrain: dropped an invalid value of {key!r:.100}: {error}", file=sys.stderr)
            self.invalid_keys.add(key)
            return None

    def _request(
        self, method: str, path: str, body: bytes | None = None, timeout: float | None = GenerationLimits.store
    ) -> bytes | None:
        """Send a request; return the answer's body, None for 404."""
        try:
            status, text = request_signed(self.client, self.server, method, path, body or b"", timeout=timeout)
        except OSError as error:
            raise StoreUnreachable(f"horovodrun at {self.location} does not answer: {error}") from error
        if status not in (200, 404):
            raise StoreUnreachable(f"horovodrun at {self.location} answers {status} to {method} {path}")
        return text if status == 200 else None


def _parse_heartbeat(text: bytes | str) -> Heartbeat:
    heartbeat: Heartbeat = parse_record(load_json(text), Heartbeat)
    return heartbeat
