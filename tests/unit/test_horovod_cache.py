"""horovodrun's cache of what it has found out about hosts, which all that start at one time read and write."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def test_starts_at_one_time_never_read_half_a_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from horovod.runner.util.cache import Cache

    def start(number: int) -> None:
        cache = Cache(str(tmp_path), 60, f"parameters {number % 3}")
        cache.put("hosts", ["h" * 1000] * 50)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(start, range(300)))
    assert capsys.readouterr().out == ""  # it would tell of a file that it cannot read, and remove it
    assert [path.name for path in tmp_path.iterdir()] == ["cache.bin"]
