"""The run options of a parameter server: how many ranks serve, and how stale the gradients that they apply may be."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hvdtrain.recipe.options import option
from hvdtrain.system.errors import suggest_nearest

STALENESS = re.compile(r"(sync)|(backup|bounded):(\d{1,9})|(async)(\+dc(?::(\d*\.?\d+))?)?")
STALENESS_FORMS = ("sync", "backup:1", "bounded:3", "async", "async+dc")
DELAY_COMPENSATION = 0.04  # what +dc multiplies its term by, unless it is given


@dataclass(frozen=True)
class Staleness:
    """Which gradients a server applies, and when.

    sync         a version of the weights is made of one item of each worker, all computed at the version before
    backup:K     the same, without waiting for the K slowest workers of each version (Chen et al., 1604.00981)
    bounded:S    each item makes a version when it arrives; it is at most S versions a worker old (Ho et al., 2013)
    async        each item makes a version when it arrives (Dean et al., 2012); +dc compensates for what the weights
                 have moved meanwhile (Zheng et al., 1609.08326)
    """

    text: str
    kind: str  # "sync", "backup", "bounded" or "async"
    number: int = 0  # K or S
    compensation: float | None = None  # of +dc

    @property
    def in_rounds(self) -> bool:
        """Whether a version is made of several items at once."""
        return self.kind in ("sync", "backup")

    def find_bound(self, workers: int) -> int | None:
        """Return how many versions old an item may be when it is applied; None: any number."""
        if self.in_rounds:
            return 0
        return self.number * workers if self.kind == "bounded" else None

    def count_parts(self, workers: int) -> int:
        """Return how many items a global batch is cut into."""
        return workers - self.number if self.kind == "backup" else workers


def parse_staleness(text: str) -> Staleness:
    """Parse the value of --staleness. Raises ValueError."""
    match = STALENESS.fullmatch(text)
    if match is None:
        near = suggest_nearest(text, STALENESS_FORMS, list_all=False)
        raise ValueError(f"--staleness is {text!r}{near}; expected sync, backup:K, bounded:S, async or async+dc")
    number = int(match[3]) if match[3] is not None else 0
    if match[2] == "backup" and number < 1:
        raise ValueError(f"--staleness {text} waits for all workers: that is --staleness sync")
    if match[2] == "bounded" and number < 1:
        raise ValueError(f"--staleness {text} allows no stale gradient: that is --staleness sync; expected bounded:1")
    compensation = None if match[5] is None else float(match[6] or DELAY_COMPENSATION)
    return Staleness(text, match[1] or match[2] or match[4], number, compensation)


@dataclass(kw_only=True)
class ServerOptions:
    """A parameter server: a dispatcher that hands out examples and weights, and applies each gradient once."""

    server: int | None = option(
        None,
        "parameter server: the first so many ranks hold the model and its optimizer, each a part; the others compute "
        "gradients. -np counts both",
        at_least=1,
    )
    staleness: str = option(
        "sync",
        "with --server: sync; backup:K, not waiting for the K slowest workers; bounded:S, gradients at most S versions "
        "a worker old; async, of any age; async+dc, with delay compensation",
    )

    def __post_init__(self) -> None:
        parse_staleness(self.staleness)
        if self.server is None and self.staleness != "sync":
            raise ValueError(f"--staleness {self.staleness} needs --server, the number of servers, for example 1")

    @property
    def policy(self) -> Staleness:
        """Which gradients are applied, and when."""
        return parse_staleness(self.staleness)
