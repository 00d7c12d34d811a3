"""Every program in every place: it runs, a planted fault is named, Ctrl-C leaves nothing running.

    python -m tests.programs.matrix [--place NAME ...] [--program NAME ...] [--json FILE]

Needs root and Slurm: two hosts are network namespaces. Prints a Markdown table; exits with 1 if anything is amiss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.programs.places import PLACES, Place

HERE = Path(__file__).parent
PROGRAMS = [
    "horovod_torch",
    "horovod_elastic",
    "torch_ddp",
    "lightning_fit",
    "accelerate_loop",
    "hf_trainer",
    "jax_distributed",
]
ELASTIC = "horovod_elastic"
CASES = ["run", "fault", "ctrl-c"]
RANKS = 2
PLANTED = "ValueError: planted fault on rank 1"
NOT_ELASTIC = "refused: MPI ends a job that loses a rank"
SLOW_TO_END = "after 5 min"
LONGEST = 120  # seconds of a case


@dataclass(frozen=True)
class Cell:
    """What came of a case: seconds, or what is wrong."""

    place: str
    program: str
    case: str
    text: str


class CaseError(Exception):
    """What a launch should have done, and what it printed."""


def check_case(place: Place, program: str, case: str) -> float:
    """Launch a program once; return the seconds that it took. Raises CaseError if not all is as it should be.

    For ctrl-c the seconds are those from the signal to the end.
    """
    line = [str(HERE / f"{program}.py"), *{"run": [], "fault": ["--fail-on", "1"], "ctrl-c": ["--wait"]}[case]]
    if program == "lightning_fit":  # its users tell it the layout
        line += ["--devices", str(RANKS // place.nodes), "--num-nodes", str(place.nodes)]
    begin = time.monotonic()
    with place.start(line, elastic=program == ELASTIC) as started:
        if case == "ctrl-c":
            if not started.wait_for("epoch 0" if program == ELASTIC else "step 0", LONGEST):
                raise CaseError(f"no first step\n{started.output()}")
            begin = time.monotonic()
            started.interrupt()
        code = started.wait(LONGEST)
        seconds = time.monotonic() - begin
        left = started.left_over()
        output = started.output()
        if code is None:
            problem: str | None = f"not ended within {LONGEST} s"
        elif left:
            problem = f"left running: {left}"
        elif program == ELASTIC and case == "fault":
            problem = find_elastic_problem(place, code, output)
        else:
            problem = find_problem(place, case, code, output)
        if problem:
            raise CaseError(f"{problem}\n{output}")
    return seconds


def find_problem(place: Place, case: str, code: int | None, output: str) -> str | None:
    """What is wrong with how a launch has ended; None if nothing."""
    expected = {"run": 0, "fault": 1, "ctrl-c": 130}[case]
    if code != expected:
        return f"exit code {code}; expected {expected}"
    if case == "run" and f"done: {RANKS} ranks" not in output:
        return f"no `done: {RANKS} ranks`"
    if case != "run" and "done:" in output:
        return "the program came to its end"
    if case == "fault":
        host = place.host_of_rank_1
        if f"error: rank 1 on {host} failed: {PLANTED}" not in output:
            return f"no `error: rank 1 on {host} failed: {PLANTED}`"
        if output.count("Traceback (most recent call last)") != 1:
            return f"{output.count('Traceback (most recent call last)')} tracebacks; expected 1"
    elif "Traceback" in output and "KeyboardInterrupt" not in output:  # shown if the program does not end by it
        return "a traceback"
    return None


def find_elastic_problem(place: Place, code: int | None, output: str) -> str | None:
    """What is wrong with how an elastic launch has ended that lost a worker; None if nothing."""
    if code != 0:
        return f"exit code {code}; expected 0"
    # Which host has rank 1 is not fixed.
    names = [host.name for host in place.hosts] or [place.host_of_rank_1]
    lines = [f"a worker on {name} failed, the others continue: {PLANTED}" for name in names]
    return None if any(line in output for line in lines) else f"no `{lines[0]}`"


def reason_to_skip(place: Place, program: str, case: str) -> str | None:
    """Why a case is left out; None if it is not."""
    if program == ELASTIC and not place.elastic:
        return NOT_ELASTIC
    # The exit handler of the process that failed waits for the others, and these wait for it in a collective.
    return SLOW_TO_END if (program, case) == ("jax_distributed", "fault") else None


def run_matrix(places: Iterable[str], programs: Iterable[str], cases: Iterable[str]) -> Iterator[Cell]:
    """Launch programs in places; yield each case's seconds, or what is wrong."""
    for name in places:
        with PLACES[name]() as place:
            for program, case in itertools.product(programs, cases):
                if why := reason_to_skip(place, program, case):
                    yield Cell(name, program, case, why)
                    continue
                try:
                    text = f"{check_case(place, program, case):.1f}"
                except CaseError as error:
                    text = f"FAILED ({str(error).splitlines()[0]})"
                    print(error, file=sys.stderr)
                print(f"{name}, {program}, {case}: {text}", file=sys.stderr, flush=True)
                yield Cell(name, program, case, text)


def markdown(cells: Iterable[Cell]) -> str:
    """A row for each program, a column for each place: `5.1 / 4.9 / 0.8` are the seconds of its cases."""
    found = {(cell.place, cell.program, cell.case): cell.text for cell in cells}
    places = [name for name in PLACES if any(name == place for place, _, _ in found)]
    lines = [f"| program | {' | '.join(places)} |", f"|---{'|---' * len(places)}|"]
    for program in PROGRAMS:
        row = []
        for place in places:
            texts = [found.get((place, program, case), "not run") for case in CASES]
            row.append(" / ".join(texts) if len(set(texts)) > 1 else texts[0])
        lines.append(f"| `{program}.py` | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", nargs="+", choices=list(PLACES), default=list(PLACES))
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--json", type=Path, help="add the results to those in this file")
    options = parser.parse_args()
    found: dict[tuple[str, str, str], Cell] = {}
    if options.json and options.json.exists():
        found = {(cell.place, cell.program, cell.case): cell for cell in read_cells(options.json)}
    for cell in run_matrix(options.place, options.program, options.case):
        found[cell.place, cell.program, cell.case] = cell
        if options.json:
            options.json.write_text(json.dumps([asdict(cell) for cell in found.values()], indent=1) + "\n")
    print(markdown(found.values()))
    return int(any(cell.text.startswith("FAILED") for cell in found.values()))


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file that --json wrote."""
    return [Cell(**entry) for entry in json.loads(path.read_text())]


if __name__ == "__main__":
    sys.exit(main())
