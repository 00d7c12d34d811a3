"""Loading data beside other threads."""

from __future__ import annotations

import hashlib
import threading
import time

from hvdtrain.torch.loader import wait_for_idle_threads


def test_a_process_is_forked_while_its_other_threads_sleep() -> None:
    ended = []

    def work() -> None:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000)  # about a second, without Python's lock
        ended.append(time.monotonic())

    wait_for_idle_threads()
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    wait_for_idle_threads(60)
    assert ended
    thread.join()
    # One that works on and on holds up nobody for long.
    thread = threading.Thread(target=work)
    begin = time.monotonic()
    thread.start()
    wait_for_idle_threads(0.1)
    assert time.monotonic() - begin < 60
    thread.join()
