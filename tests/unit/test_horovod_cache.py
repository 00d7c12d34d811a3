"""horovodrun's cache of its checks of hosts, which all launches of a user read and write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def test_concurrent_launches_never_read_half_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from horovod.runner.util.cache import Cache

    def start(number: int) -> None:
        cache = Cache(str(tmp_path), 60, f"parameters {number % 3}")
        cache.put("hosts", ["h" * 1000] * 50)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(start, range(300)))
    assert capsys.readouterr().out == ""  # it prints a message about a file that it cannot read
    assert [path.name for path in tmp_path.iterdir()] == ["cache.bin"]
