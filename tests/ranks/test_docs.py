"""The code in README and docs works as it stands: each page's blocks are run, on one and on two ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.harness import ROOT, Job
from tests.support.pages import PAGES, is_run, page_name, read_blocks

ENVIRONMENT = {
    # The blocks are run as they stand, also where tests run as root or on fewer cores than ranks.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

QUICK = "README.md"  # commands of other pages run in other tests


def list_pages() -> Iterator[Any]:
    """Yield the pages with blocks that are run."""
    for page in PAGES:
        if any(map(is_run, read_blocks(page))):
            yield pytest.param(page, id=page_name(page), marks=[pytest.mark.slow] * (page_name(page) != QUICK))


@pytest.mark.parametrize("page", list(list_pages()))
@pytest.mark.timeout(900)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.pages", str(page), str(tmp_path)]
    with Job(command, ENVIRONMENT, ROOT) as job:
        done = job.finish(timeout=850)
    print(done.stdout)  # each block with its time, or why it is not run
    assert done.returncode == 0, done.stdout + done.stderr
