"""What benchmarks measured, as tables: printed as Markdown, and kept as JSON for docs/benchmarks.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Table:
    """Figures as they are shown.

    Attributes:
        columns: the headings.
        rows: of as many cells each.
        caption: what stands above the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        """The caption and the table."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"{self.caption}\n\n{text}" if self.caption else text


@dataclass(frozen=True)
class Results:
    """The tables of one run of a benchmark, and how they came about.

    Attributes:
        command: that makes them again.
        date: as 2026-11-22.
        machine: in words.
        commit: of the code; "" if it is not known.
        tables: what was measured.
        note: what a reader must know about this run.
    """

    command: str
    date: str
    machine: str
    commit: str
    tables: Sequence[Table]
    note: str = ""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote. Raises TypeError if it lacks something or has too much."""
        saved = json.loads(path.read_text())
        return cls(**{**saved, "tables": [Table(**table) for table in saved["tables"]]})

    def markdown(self) -> str:
        """The tables, and a line about the run."""
        day = datetime.date.fromisoformat(self.date)
        about = f"{day.day} {day:%B %Y}, {self.machine}" + (f", commit {self.commit}" if self.commit else "")
        note = f" {self.note}" if self.note else ""
        return "\n\n".join([*(table.markdown() for table in self.tables), f"`{self.command}` ({about}).{note}"])


def publish(path: Path | None, tables: Sequence[Table], machine: str | None = None) -> None:
    """Print tables; with a path, also save them there as Results of this command, machine and commit."""
    print("\n\n".join(table.markdown() for table in tables), flush=True)
    if path is None:
        return
    module = Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("")
    name = ".".join(module.parent.parts if module.name == "__main__" else module.parts)
    command = shlex.join(["python", "-m", name, *without_json(sys.argv[1:])])
    today = datetime.date.today().isoformat()
    Results(command, today, machine or describe_machine(), current_commit(), tables).save(path)


def without_json(arguments: Sequence[str]) -> list[str]:
    """A benchmark's arguments but for `--json FILE`."""
    kept: list[str] = []
    values = iter(arguments)
    for value in values:
        if value == "--json":
            next(values)
        elif not value.startswith("--json="):
            kept.append(value)
    return kept


def describe_machine() -> str:
    """This machine's cores and processor."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models: list[Any] = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"


def current_commit() -> str:
    """The commit that is checked out, with + behind it if files differ from it; "" outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
