"""Watch from a rank's host whether the launch still runs: killed at once, it could not end programs on other hosts."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Mapping

from hvdtrain.launch.places import KEY_PREFIX, find_store
from hvdtrain.system import signed_http
from hvdtrain.system.http import request_signed
from hvdtrain.system.limits import ProgramLimits
from hvdtrain.system.signed_http import SignedClient

REFUSALS = 2  # in a row: nobody listens any more


def watch_launch(environ: Mapping[str, str], end_program: Callable[[], None]) -> None:
    """Call `end_program`, in a thread, once the launch's store no longer answers; on the launch's own host never.

    A host that does not answer may be back soon, and gets `ProgramLimits.launch_silent` seconds.
    """
    store = find_store(environ)
    if store is None or ipaddress.ip_address(store[0]).is_loopback:
        return
    threading.Thread(target=_watch, args=(store, signed_http.read_key(environ), end_program), daemon=True).start()


def _watch(store: tuple[str, int], key: bytes, end_program: Callable[[], None]) -> None:
    client, limits = SignedClient(key), ProgramLimits()
    refusals, last_answer = 0, time.monotonic()
    while refusals < REFUSALS and time.monotonic() - last_answer < limits.launch_silent:
        time.sleep(limits.watch)
        try:
            request_signed(client, store, "GET", f"{KEY_PREFIX}0", timeout=limits.store)
            refusals, last_answer = 0, time.monotonic()
        except ConnectionRefusedError:
            refusals += 1
        except OSError:
            refusals = 0
    end_program()
