"""What the machine offers is used through one module each, so that time limits and proxies are decided once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hvdtrain"
# By what the source says, the modules that may say it, each with a reason if it is not the mechanism itself.
MECHANISMS = {
    r"import subprocess\b": {
        "system/processes.py",
        "launch/job.py",  # the guard, which lives as long as the pipe to it
        "launch/guard.py",  # the launcher, whose descendants the guard ends by its own rules
        "launch/program_process.py",  # a program, whose descendants its keeper ends by its own rules
        "elastic/worker.py",  # the worker, which its supervisor watches without a time limit
    },
    r"\b(urllib\.request|HTTPConnection)\b": {"system/http.py", "system/signed_http.py"},
    r"\bset_wakeup_fd\b": {"system/signals.py"},
    r"\bfrom rich\.progress\b": {"system/progress.py"},
    r"\bBatchMode\b": {"system/ssh.py"},
}


@pytest.mark.parametrize("pattern", MECHANISMS)
def test_one_module_uses_it(pattern: str) -> None:
    users = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if re.search(pattern, path.read_text())}
    assert users <= MECHANISMS[pattern]
