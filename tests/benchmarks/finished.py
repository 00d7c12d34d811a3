"""Results of long benchmarks, a JSON line for each finished run: one that was stopped can go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Results:
    """The rows of a file that is there or not; without a file they are only kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of the run that `about` tells of; None if it is not finished."""
        return next((row for row in self.rows if about.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep the row of a finished run."""
        self.rows.append(row)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
