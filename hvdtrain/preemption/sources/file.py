"""Notices from a file, for schedulers without a source of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvdtrain.preemption.source import REQUIRED, Notice, NoticeSource, notice_source, source_option


@notice_source("file")
@dataclass(kw_only=True)
class FileSource(NoticeSource):
    """A file: the notice is given when --notice-file appears; its first line is the reason."""

    poll_interval = 0.5

    notice_file: Path = source_option(REQUIRED, "The notice is given when this file appears.", metavar="FILE")

    @property
    def location(self) -> str:
        """The file."""
        return str(self.notice_file)

    def poll(self) -> Notice | None:
        try:
            with self.notice_file.open(errors="replace") as file:
                words = file.readline(200).strip()
        except FileNotFoundError:
            return None
        return Notice(words or f"{self.notice_file} exists", self.grace)
