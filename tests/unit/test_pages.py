"""README and docs: every block of code is run or says why not, links lead somewhere, figures are those of results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.benchmarks.page import PAGE, render_page
from tests.support.pages import PAGES, ROOT, is_run, page_name, read_blocks, run_page

NO_CODE = ("text", "mermaid")  # shown, not run: output, figures
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def test_every_block_is_run_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints those that are not run."""
    wrong = []
    for page in PAGES:
        blocks = read_blocks(page)
        for number, block in enumerate(blocks):
            where = f"{page_name(page)}:{block.line}"
            if block.not_run:
                with capsys.disabled():
                    print(f"{where}: not run: {block.not_run}")
            elif block.is_recipe:
                continue  # tests/ranks/test_jobs.py trains each
            elif block.file:
                texts = [other.text for other in blocks[number + 1 :] if is_run(other) or other.file or other.not_run]
                if not any(re.search(rf"\b{re.escape(Path(block.file).stem)}\b", text) for text in texts):
                    wrong.append(f"{where}: no block below uses {block.file}")
            elif block.language == "":
                wrong.append(f"{where}: name the block's language; `text` for what is no code")
            elif not is_run(block) and block.language not in NO_CODE:
                wrong.append(f"{where}: {block.language} is not run: add `<!-- not run: REASON -->` above the block")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target, heading in LINK.findall(remove_code(page.read_text())):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page_name(page)} links to {target}, which does not exist"
        if heading:
            assert heading in anchors(path), f"{page_name(page)} links to {target}#{heading}, which does not exist"


def remove_code(text: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```", "", text)


def anchors(page: Path) -> set[str]:
    """What can stand after # in a link to a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", remove_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_page_of_benchmarks_is_made_of_their_results() -> None:
    assert PAGE.read_text() == render_page(), "run python -m tests.benchmarks.page"


def test_the_tests_that_the_page_of_faults_names_exist() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    files = re.findall(r"`(\w+/test_\w+\.py)", text)
    functions = re.findall(r"\b(test_\w+)`", text)
    assert [file for file in files if not (ROOT / "tests" / file).exists()] == []
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [function for function in functions if f"def {function}(" not in sources] == []


def write_page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text)
    return path


def test_blocks_carry_what_the_comment_above_them_says(tmp_path: Path) -> None:
    text = "<!-- not run: needs\na host -->\n```sh\nfalse\n```\n\n<!-- file: a.py -->\n```python\nx = 1\n```\n"
    text += "<!-- not run: too far above -->\nText.\n```sh\ntrue\n```\n"
    blocks = read_blocks(write_page(tmp_path, text))
    assert [(block.not_run, block.file, block.language) for block in blocks] == [
        ("needs a host", "", "sh"),
        ("", "a.py", "python"),
        ("", "", "sh"),
    ]
    assert list(map(is_run, blocks)) == [False, False, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\ntrue\nfalse\n```\n", r"page\.md:1: exit 1"),
        ("\n```python\nx = 1\nx / 0\n```\n", r'File ".*page\.md:2", line 4'),
        ("<!-- check: assert False -->\n", r"AssertionError"),
        ("```sh\necho 1 2\n```\n```text\n1 3\n```\n", r"page\.md:4: expected"),
    ],
    ids=["sh", "python", "check", "output"],
)
def test_a_block_that_fails_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=message):
        run_page(write_page(tmp_path, text), tmp_path)


def test_blocks_share_a_folder_and_a_namespace(tmp_path: Path) -> None:
    text = "<!-- file: a.txt -->\n```sh\nhi\n```\n```sh\ncat a.txt; echo 12 s\n```\n```text\nhi ... s\n```\n"
    text += "```python\nx = 1\n```\n<!-- check: assert x == 1 -->\n"
    run_page(write_page(tmp_path, text), tmp_path)


@pytest.mark.parametrize("text", ["```sh\ntrue\n", "Text\n\n    indented\n"])
def test_blocks_that_are_not_fenced_are_rejected(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page\.md:\d: (this fence|an indented block)"):
        read_blocks(write_page(tmp_path, text))
