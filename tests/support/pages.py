"""Markdown pages whose code is run: their blocks, and a runner that goes through a page from top to bottom.

    python -m tests.support.pages PAGE.md FOLDER        run a page's blocks in FOLDER

A block in `sh` or `python` is run, in the order of the page: `sh` by bash, all `python` in one interpreter and one
namespace. Commands of one rank, such as `hvdtrain train`, are run in this interpreter, too, if a block has no others.
A `text` block right below a run block is what that one printed; `...` stands for anything. HTML comments, which
readers do not see, say the rest:

    <!-- not run: REASON -->     above a block: it is not run
    <!-- file: NAME -->          above a block: it is written to FOLDER/NAME, for blocks below to use
    <!-- recipe: NAME -->        above a block: likewise, below the page's first `python` block, its imports;
                                 tests/ranks/test_jobs.py trains it on two ranks
    <!-- uses: PAGE.md -->       anywhere: write the files of that page first
    <!-- check: CODE -->         anywhere: Python that is run there, in the namespace of the page
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "cluster/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
RUN = ("sh", "python")  # languages of blocks that are run
OF_ONE_RANK = [["hvdtrain", name] for name in ("train", "evaluate", "predict", "ledger", "list")]
FENCE = re.compile(r"^(`{3,}|~{3,})(.*)$")
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.DOTALL)


@dataclass
class Block:
    """A fenced block of a page, or a comment that is code.

    Attributes:
        line: of the page, from 1.
        language: as the fence names it; "check" for a comment.
        text: what is in it.
        not_run: the reason why it is not run; "" if it is.
        file: the file that it is written to; "" for none.
        is_recipe: that file begins with the page's imports.
    """

    line: int
    language: str
    text: str
    not_run: str = ""
    file: str = ""
    is_recipe: bool = False


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order. Raises ValueError for a fence that is not closed and for an indented block."""
    lines = page.read_text().splitlines()
    blocks: list[Block] = []
    number = 0
    mark = ""  # the comment right above
    while number < len(lines):
        line = lines[number]
        if fence := FENCE.match(line):
            end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == fence[1]), None)
            if end is None:
                raise ValueError(f"{page.name}:{number + 1}: this fence is not closed")
            block = Block(number + 1, fence[2].strip(), "\n".join(lines[number + 1 : end]) + "\n")
            kind, _, value = mark.partition(":")
            if kind == "not run":
                block.not_run = " ".join(value.split())
            elif kind in ("file", "recipe"):
                block.file, block.is_recipe = value.strip(), kind == "recipe"
            blocks.append(block)
            number, mark = end + 1, ""
        elif line.startswith("<!--"):
            end = next(n for n in range(number, len(lines)) if "-->" in lines[n])
            found = COMMENT.match("\n".join(lines[number : end + 1]))
            mark = found[1] if found else ""
            if mark.startswith("check:"):
                blocks.append(Block(number + 1, "check", mark.removeprefix("check:").strip() + "\n"))
            number = end + 1
        else:
            if line.startswith("    ") and number and not lines[number - 1].strip():
                raise ValueError(f"{page.name}:{number + 1}: an indented block: write a fence that names its language")
            mark = mark if not line.strip() else ""
            number += 1
    return blocks


def is_run(block: Block) -> bool:
    """Whether the runner executes a block itself."""
    return not block.not_run and not block.file and block.language in (*RUN, "check")


def page_name(page: Path) -> str:
    """A page's path within the project."""
    return str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name)


def used_pages(page: Path) -> list[Path]:
    """The pages whose files this one uses."""
    marks = COMMENT.findall(page.read_text())
    return [page.parent / mark.removeprefix("uses:").strip() for mark in marks if mark.startswith("uses:")]


def read_files(page: Path) -> dict[str, str]:
    """Return the contents of all files that a page has, by their names, with those of the pages that it uses."""
    blocks = read_blocks(page)
    imports = next((block.text for block in blocks if block.language == "python" and is_run(block)), "")
    files: dict[str, str] = {}
    for other in used_pages(page):
        files |= read_files(other)
    return files | {block.file: imports * block.is_recipe + block.text for block in blocks if block.file}


def write_file(name: str, text: str, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if text.startswith("#!"):
        path.chmod(0o755)


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page in a folder. Raises AssertionError, which names the block, for one that fails."""
    files, blocks = read_files(page), read_blocks(page)
    own = {block.file for block in blocks if block.file and not block.is_recipe}
    for name in files.keys() - own:
        write_file(name, files[name], folder)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = None  # by the block before, if that was run
    for block in blocks:
        where = f"{page_name(page)}:{block.line}"
        if block.not_run:
            print(f"{where}: not run: {block.not_run}", flush=True)
            printed = None
        elif block.file:
            write_file(block.file, files[block.file], folder)
            printed = None
        elif is_run(block):
            begin = time.monotonic()
            printed = run_code(block, where, folder, namespace)
            print(f"{where}: {block.language} ran for {time.monotonic() - begin:.1f} s", flush=True)
        else:
            if block.language == "text" and printed is not None:
                compare_output(block.text, printed, where)
            printed = None


def run_code(block: Block, where: str, folder: Path, namespace: dict[str, object]) -> str:
    """Run a block and return what it printed. Raises AssertionError if it fails."""
    if block.language == "sh" and (commands := parse_commands_of_one_rank(block.text)):
        return run_commands_here(commands, where)
    if block.language == "sh":
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 0, f"{where}: exit {done.returncode}\n{block.text}\n{done.stdout}{done.stderr}"
        return done.stdout
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(
                compile(
                    "\n" * (block.line - (block.language == "check")) + block.text, where, "exec", dont_inherit=True
                ),
                namespace,
            )
    except BaseException:
        raise AssertionError(f"{where}\n{printed.getvalue()}\n{traceback.format_exc()}") from None
    return printed.getvalue()


def parse_commands_of_one_rank(text: str) -> list[list[str]]:
    """Return the arguments of `hvdtrain`, by command; [] if there are other commands, or a shell is needed."""
    if re.search(r"[|&;$<>`*\\]", text):
        return []
    lines = [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    return [line[1:] for line in lines] if all(line[:2] in OF_ONE_RANK for line in lines) else []


def run_commands_here(commands: Sequence[Sequence[str]], where: str) -> str:
    """Run commands of `hvdtrain` in this process, whose torch is loaded; return what they print on standard output."""
    from hvdtrain.cli.main import main as run_hvdtrain

    printed, errors = io.StringIO(), io.StringIO()
    for command in commands:
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
                run_hvdtrain(list(command))
        except SystemExit as end:
            text = f"{where}: exit {end.code}\nhvdtrain {' '.join(command)}\n{printed.getvalue()}{errors.getvalue()}"
            assert end.code == 0, text
    return printed.getvalue()


def compare_output(expected: str, printed: str, where: str) -> None:
    """Raise AssertionError if a block printed something else; `...` stands for any text."""
    pattern = r"(?s:.*?)".join(re.escape(part) for part in " ".join(expected.split()).split("..."))
    text = " ".join(printed.split())
    assert re.fullmatch(pattern, text), f"{where}: expected\n{expected}\nbut the block above printed\n{printed}"


def main() -> None:
    page, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        run_page(page, folder)
    except AssertionError as error:
        print(error, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
