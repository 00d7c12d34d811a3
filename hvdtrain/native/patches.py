"""The changes to Horovod's released source: unified diffs in patches/NN-purpose.patch.

Each patch opens with a header that says why it is needed and names the Horovod issue, if there is one; `---` and the
diff follow. A line `Condition: ...` in the header limits it to some builds. Patches apply in the order of their names,
each to the result of those before it, and strictly: a line that is not exactly where and what the patch expects stops
the build.

patches/REVISIONS numbers the states of the patches: its last line has N, as in the wheel's version 0.28.1+hvdtrain.N,
and the digest of all patches. A test fails until a change of the patches has a new line there.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.system.errors import RunError

PATCH_FOLDER = Path(__file__).with_name("patches")
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@")
FILES = re.compile(r"--- (?:a/(?P<old>\S+)|/dev/null)\n\+\+\+ b/(?P<new>\S+)\n")
CONDITION = re.compile(r"^Condition: (.*)$", re.MULTILINE)


class Condition(enum.Enum):
    """The builds to which a patch applies; the value is how its header says it."""

    ALWAYS = "always"
    WITHOUT_NCCL = "without NCCL"

    def includes_build(self, *, nccl: bool) -> bool:
        """Return whether a build with or without NCCL gets the patch."""
        return self is Condition.ALWAYS or not nccl


@dataclass(frozen=True)
class SourcePatch:
    """One patch: a header and a unified diff.

    Attributes:
        name: The file's name without its ending, such as "60-cxx-standard".
        text: The whole file.
    """

    name: str
    text: str

    @property
    def condition(self) -> Condition:
        """The builds to which the patch applies. Raises ValueError if its header names an unknown condition."""
        found = CONDITION.search(self.text.partition("\n---\n")[0])
        return Condition(found[1]) if found else Condition.ALWAYS

    def hash_changes(self) -> str:
        """Return the SHA-256 of what the patch changes: editing its header does not make another build."""
        return hashlib.sha256("".join(self.text.partition("\ndiff ")[1:]).encode()).hexdigest()


def read_patches(folder: Path = PATCH_FOLDER) -> list[SourcePatch]:
    """Read all patches of a folder, in the order in which they apply."""
    return [SourcePatch(path.stem, path.read_text()) for path in sorted(folder.glob("*.patch"))]


def select_patches(*, nccl: bool) -> list[SourcePatch]:
    """Return the patches for a build with or without NCCL, in the order in which they apply."""
    return [patch for patch in read_patches() if patch.condition.includes_build(nccl=nccl)]


def read_revision(folder: Path = PATCH_FOLDER) -> tuple[int, str]:
    """Return the number of the patches' revision, and the digest that its patches must have."""
    number, digest = (folder / "REVISIONS").read_text().splitlines()[-1].split()
    return int(number), digest


def digest_patches(patches: Iterable[SourcePatch]) -> str:
    """Return the SHA-256 over the names, conditions and changes of patches."""
    text = "".join(f"{patch.name} {patch.condition.value} {patch.hash_changes()}\n" for patch in patches)
    return hashlib.sha256(text.encode()).hexdigest()


def apply_patches(tree: Path, patches: Sequence[SourcePatch]) -> None:
    """Apply patches to an unpacked source.

    Raises:
        RunError: A hunk does not apply; the message names patch, file and line.
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
    """Yield, for each file in a patch, its old name (None if it is new), its name, and the lines of its hunks."""
    found = list(FILES.finditer(text))
    for match, following in zip(found, [*found[1:], None], strict=True):
        end = text.rindex("\ndiff ", 0, following.start()) + 1 if following else len(text)
        yield match["old"], match["new"], text[match.end() : end].splitlines(keepends=True)


def patch_lines(lines: list[str], hunks: list[str], where: str) -> list[str]:
    """Return the lines of a file after its hunks.

    Args:
        lines: The file's lines, with their ends.
        hunks: The lines of all its hunks.
        where: How error messages begin: patch and file.

    Raises:
        RunError: A hunk does not apply.
    """
    patched: list[str] = []
    consumed = 0  # lines of the file that have been copied or removed
    for line in hunks:
        if header := HUNK.match(line):
            start = int(header[1]) - (header[2] != "0")
            if not consumed <= start <= len(lines):
                raise RunError(f"{where} has {len(lines)} lines; expected at least {start}")
            patched += lines[consumed:start]
            consumed = start
        elif line.startswith("+"):
            patched.append(line[1:])
        elif line.startswith((" ", "-")):
            if consumed >= len(lines) or lines[consumed] != line[1:]:
                expected = line[1:].rstrip("\n")
                actual = lines[consumed].rstrip("\n") if consumed < len(lines) else "the end of the file"
                raise RunError(f"{where}, line {consumed + 1}: expected {expected!r}, got {actual!r}")
            if line.startswith(" "):
                patched.append(lines[consumed])
            consumed += 1
        else:
            raise RunError(f"{where}: {line.rstrip()!r} is not a line of a unified diff")
    return patched + lines[consumed:]
