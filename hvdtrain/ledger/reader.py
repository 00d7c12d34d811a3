"""Reading the segments of a ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hvdtrain.ledger.made import MadeVersion, RecordedService, parse_made_line, parse_service
from hvdtrain.ledger.rows import (
    HEADER_PATTERN,
    LEDGER_FORMAT,
    ORDER_PATTERN,
    RANGES_PATTERN,
    ROW_PATTERN,
    SHARES_PATTERN,
    LedgerRow,
    order_path,
    parse_ranges,
)
from hvdtrain.recipe.given_order import GivenOrder, decode_file
from hvdtrain.recipe.ranges import Ranges, join_ranges
from hvdtrain.system.errors import UserError


@dataclass(frozen=True)
class Segment:
    """What one writer wrote."""

    name: str  # of its file
    seed: int
    examples: int
    batch: int
    first_step: int
    order_version: int
    rows: list[LedgerRow]
    invalid_lines: list[int]  # numbers of lines that are not rows
    orders: dict[int, str]  # by epoch (from 1), the key of what a sampler gave for it
    shares: dict[int, str]  # by the first step of each, how the batch was dealt; "": evenly
    lost: dict[int, Ranges] = field(default_factory=dict)  # by the step after which they were lost
    owed: dict[int, Ranges] = field(default_factory=dict)  # by the step that was made of them
    made: dict[int, MadeVersion] = field(default_factory=dict)  # by step, of a parameter server
    service: RecordedService | None = None  # how these were made

    def find_shares(self, step: int) -> str:
        """Return how the batch of a step was dealt; "": evenly."""
        return next((self.shares[first] for first in sorted(self.shares, reverse=True) if first <= step), "")


def find_segments(folder: Path) -> dict[int, Path]:
    """Return the segments' files by their numbers, in order."""
    found = {int(path.stem[8:]): path for path in folder.glob("segment-*.csv") if path.stem[8:].isdecimal()}
    return dict(sorted(found.items()))


def read_segment(path: Path) -> Segment:
    """Read a segment, without a torn last line, which a process leaves that is killed while it writes.

    Raises:
        UserError: it cannot be read, or its header is damaged.
    """
    try:
        lines = path.read_bytes().decode("ascii", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    header = HEADER_PATTERN.fullmatch(lines[0])
    if header is None or len(lines) < 3 or lines[1] != ",".join(LedgerRow._fields):
        raise UserError(
            f"{path} is not a ledger segment of this version of hvdtrain: expected a header of format {LEDGER_FORMAT!r}"
        )
    order_version, seed, examples, batch, first_step = map(int, header.groups()[:-2])
    rows, invalid_lines, orders, made = [], [], {}, dict[int, MadeVersion]()
    shares = {first_step: header[6] or ""}
    marked: dict[str, dict[int, Ranges]] = {"lost": {}, "owed": {}}
    for number, line in enumerate(lines[2:-1], start=3):  # what follows the last newline is torn, or empty
        if found := ROW_PATTERN.fullmatch(line):
            rows.append(LedgerRow(*map(int, found.groups())))
        elif found := ORDER_PATTERN.fullmatch(line):
            orders[int(found[1])] = found[2]
        elif found := SHARES_PATTERN.fullmatch(line):
            shares[int(found[1])] = "" if found[2] == "even" else found[2]
        elif (found := RANGES_PATTERN.fullmatch(line)) and (ranges := parse_ranges(found[3])) is not None:
            marked[found[1]][int(found[2])] = ranges
        elif (version := parse_made_line(line)) is not None:
            made[version[0]] = version[1]
        else:
            invalid_lines.append(number)
    return Segment(
        name=path.name,
        seed=seed,
        examples=examples,
        batch=batch,
        first_step=first_step,
        order_version=order_version,
        rows=rows,
        invalid_lines=invalid_lines,
        orders=orders,
        shares=shares,
        made=made,
        service=parse_service(header[7] or ""),
        **marked,
    )


def load_given_order(folder: Path, key: str) -> GivenOrder:
    """Return what a sampler gave, by its key, from the ledger's folder. Raises UserError for a bad or missing file."""
    path = order_path(folder, key)
    try:
        given = decode_file(path.read_bytes())
        if given.key != key:
            raise ValueError(f"has other contents than its name says ({given.key})")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
    return given


def select_effective_losses(segments: list[Segment]) -> dict[int, Ranges]:
    """Return what was lost, by the step after which, without what a later segment supersedes."""
    kept: dict[int, Ranges] = {}
    for segment in segments:
        kept = {step: ranges for step, ranges in kept.items() if step < segment.first_step}
        kept |= {step: join_ranges(kept.get(step, []), ranges) for step, ranges in segment.lost.items()}
    return kept


def select_effective_rows(segments: list[Segment]) -> list[tuple[LedgerRow, Segment]]:
    """Return the rows that no later segment supersedes, each with its segment."""
    kept: list[tuple[LedgerRow, Segment]] = []
    for segment in segments:
        kept = [(row, source) for row, source in kept if row.step < segment.first_step]
        kept += [(row, segment) for row in segment.rows]
    return kept
