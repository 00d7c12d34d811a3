"""Write docs/benchmarks.md from its template, page.md, and the results in tests/benchmarks/results.

    python -m tests.benchmarks.page [--check]

In the template a line `{{NAME}}` stands for results/NAME.json, which a benchmark's `--json` wrote.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tests.benchmarks.tables import RESULTS, ROOT, Results

TEMPLATE = Path(__file__).with_name("page.md")
PAGE = ROOT / "docs" / "benchmarks.md"
PLACE = re.compile(r"^\{\{([\w-]+)\}\}$", re.MULTILINE)


def render_page() -> str:
    """The page. Raises ValueError if there are results that the template does not use."""
    template = TEMPLATE.read_text()
    unused = {path.stem for path in RESULTS.glob("*.json")} - set(PLACE.findall(template))
    if unused:
        raise ValueError(f"{TEMPLATE.name} has no place for {', '.join(sorted(unused))}")
    return PLACE.sub(lambda place: Results.load(RESULTS / f"{place[1]}.json").markdown(), template)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is another")
    options = parser.parse_args()
    page = render_page()
    if options.check:
        return int(PAGE.read_text() != page)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
