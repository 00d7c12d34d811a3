"""What a parameter server's versions of the weights were made of, as the ledger has it.

The header ends in " service=bounded:3/1/3/2/600": the policy of --staleness, the servers, the workers, the threads of
each, and the steps at which the run ends. Before its row, a version has a line

    # made 41 0.05 38:128-171 40:171-214

that says: step 41 made a version, by the optimizer at 0.05 times its learning rate, of the gradients of the positions
128 to 171 of the epoch's order, computed with the weights after step 38, and of 171 to 214, after step 40; weighted by
their examples, and added up in this order. The row's offset is where the order continues: all before it was handed out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from hvdtrain.exchange.server_options import Staleness, parse_staleness
from hvdtrain.recipe.ranges import Ranges, join_ranges

MADE_PATTERN = re.compile(r"# made ([1-9]\d{0,17}) ([\d.e+-]{1,32})((?: \d{1,18}:\d{1,18}-\d{1,18})+)")
SERVICE_PATTERN = re.compile(r"([\w:.+]+)/(\d+)/([1-9]\d*)/([1-9]\d*)/(\d+)")


class AppliedItem(NamedTuple):
    """Positions [begin, end) of an epoch's order, whose gradient was computed with the weights after step `read`."""

    read: int
    begin: int
    end: int


@dataclass(frozen=True)
class MadeVersion:
    """What a version was made of."""

    factor: float  # of the optimizer's learning rate
    items: list[AppliedItem]  # in the order in which their gradients were added up

    @property
    def ranges(self) -> Ranges:
        """The positions of all items."""
        return join_ranges([[item.begin, item.end] for item in self.items])

    def format_line(self, step: int) -> str:
        """Return the line that stands before the version's row."""
        items = " ".join(f"{item.read}:{item.begin}-{item.end}" for item in self.items)
        return f"# made {step} {self.factor!r} {items}"


def parse_made_line(line: str) -> tuple[int, MadeVersion] | None:
    """Return the step and what its version was made of; None for another line."""
    match = MADE_PATTERN.fullmatch(line)
    if match is None:
        return None
    try:
        factor = float(match[2])
    except ValueError:
        return None
    items = [AppliedItem(*map(int, re.split("[:-]", text))) for text in match[3].split()]
    return int(match[1]), MadeVersion(factor, items)


@dataclass(frozen=True)
class RecordedService:
    """How versions were made, as a segment's header has it."""

    policy: Staleness
    servers: int
    workers: int
    threads: int
    steps: int  # at which the run ends


def parse_service(text: str) -> RecordedService | None:
    """Return what the header of a segment says of the servers; None if it has none, or that is not valid."""
    match = SERVICE_PATTERN.fullmatch(text)
    try:
        return None if match is None else RecordedService(parse_staleness(match[1]), *map(int, match.groups()[1:]))
    except ValueError:
        return None
