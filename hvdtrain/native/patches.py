"""Changes to Horovod's released source as unified diffs: patches/NN-name.patch, each with a header that says why."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system.errors import RunError

FOLDER = Path(__file__).with_name("patches")
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")
FILES = re.compile(r"--- (?:a/(?P<old>\S+)|/dev/null)\n\+\+\+ b/(?P<new>\S+)\n")


@dataclass(frozen=True)
class SourcePatch:
    """A unified diff, applied in the order of its file's name."""

    name: str
    text: str

    def digest(self) -> str:
        """The SHA-256 of what it changes: another header does not make another build."""
        return hashlib.sha256("".join(self.text.partition("\ndiff ")[1:]).encode()).hexdigest()


def read_patches(folder: Path = FOLDER) -> list[SourcePatch]:
    """Read all patches of a folder, in the order in which they apply."""
    return [SourcePatch(path.stem, path.read_text()) for path in sorted(folder.glob("*.patch"))]


def apply_patches(tree: Path, patches: Sequence[SourcePatch]) -> None:
    """Apply patches to an unpacked source: every line must be where the patch says, and as it says.

    Raises:
        RunError: a hunk does not apply; the message names patch, file and line.
    """
    for patch in patches:
        for old, new, hunks in split_files(patch.text):
            path = tree / new
            if old is None and path.exists():
                raise RunError(f"patch {patch.name}: Horovod's source has {new} already")
            if old is not None and not path.is_file():
                raise RunError(f"patch {patch.name}: Horovod's source has no {old}")
            lines = path.read_text().splitlines(keepends=True) if old is not None else []
            path.write_text("".join(patch_lines(lines, hunks, f"patch {patch.name}: {new}")))


def split_files(text: str) -> Iterator[tuple[str | None, str, list[str]]]:
    """Each file's old name, None if it is new, its name, and the lines of its hunks."""
    found = list(FILES.finditer(text))
    for match, following in zip(found, [*found[1:], None], strict=True):
        end = text.rindex("\ndiff ", 0, following.start()) + 1 if following else len(text)
        yield match["old"], match["new"], text[match.end() : end].splitlines(keepends=True)


def patch_lines(lines: list[str], hunks: list[str], where: str) -> list[str]:
    """The lines of a file after its hunks. Raises RunError, beginning with `where`."""
    patched: list[str] = []
    at = 0  # so many lines are taken over or removed
    for line in hunks:
        if header := HUNK.match(line):
            start = int(header[1]) - (header[2] != "0")
            if not at <= start <= len(lines):
                raise RunError(f"{where} has {len(lines)} lines; expected at least {start}")
            patched += lines[at:start]
            at = start
        elif line.startswith("+"):
            patched.append(line[1:])
        elif line.startswith((" ", "-")):
            if at >= len(lines) or lines[at] != line[1:]:
                wanted = line[1:].rstrip("\n")
                there = lines[at].rstrip("\n") if at < len(lines) else "the end of the file"
                raise RunError(f"{where}, line {at + 1}: expected {wanted!r}, got {there!r}")
            if line.startswith(" "):
                patched.append(lines[at])
            at += 1
        else:
            raise RunError(f"{where}: {line.rstrip()!r} is not a line of a unified diff")
    return patched + lines[at:]
