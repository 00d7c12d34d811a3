"""Step times of recipes in JAX, Keras and torch, and of the loops that they are compared with, side by side.

    python -m tests.benchmarks.frameworks --sections mlp [conv keras fit slow] [--rounds 8] [--steps 10] [--json FILE]

Two ranks with one thread each on this host. All ways of a section are started first, then they train in turns of so
many steps, and each round begins with another way; a way's ranks are stopped while others train. A step is all that
there is between the begin of two steps. Ratios are of the median steps of one round, and the median over the rounds
counts. The section `slow` needs root: its ranks are on hosts joined at 1 Gbit/s.

A way is [model]-[how]: the model `mlp` has 10 M parameters, `conv` three convolutions and a dense layer. How: `jax`,
`torch`, `keras-BACKEND`: a recipe in hvdtrain; `fit-BACKEND`: Keras's own model.fit with hvdtrain's
DistributedOptimizer; `ddp`: torch's DistributedDataParallel over Gloo; `distributed`: jax.distributed with JAX's own
collectives over Gloo; `alone`: a jitted step without other processes; `all-reduce`: Horovod's, of as many bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.framework_ways.turns import Turn, Way
from tests.benchmarks.start import machines
from tests.benchmarks.tables import Table, publish

RANKS = 2
WARM_UP = 4  # steps before the first turn, which compile
RATE = "1gbit"
PARTS = ("forward", "backward", "DLPack", "bridge", "bucket copy", "exchange", "update", "trainer")  # see `parts`


@dataclass(frozen=True)
class Bar:
    """What a way's step may take at most: `limit` times the steps of the ways `against` together.

    Attributes:
        part: only this part of the way's step; "": all of it.
    """

    way: str
    limit: float
    against: tuple[str, ...]
    part: str = ""

    def describe(self) -> str:
        """What is compared, in words."""
        what = f"{self.part} of `{self.way}`" if self.part else f"`{self.way}`"
        return f"{what} / {' + '.join(f'`{way}`' for way in self.against)}"


@dataclass(frozen=True)
class Section:
    """Ways that are measured in turns, and what is expected of them.

    Attributes:
        rate: of the links between hosts; None: this host.
        parts: the ways whose steps are shown in parts.
    """

    caption: str
    ways: tuple[str, ...]
    bars: tuple[Bar, ...]
    rate: str | None = None
    parts: tuple[str, ...] = ()


BACKENDS = ("jax", "tensorflow", "torch")
SECTIONS = {
    "mlp": Section(
        "10 M parameters, 64 examples a rank",
        ("mlp-jax@64", "mlp-jax+parts@64", "mlp-torch@64", "mlp-ddp@64", "mlp-distributed@64", "mlp-alone@64")
        + ("mlp-all-reduce@64",),
        (
            Bar("mlp-jax@64", 0.95, ("mlp-ddp@64",)),
            Bar("mlp-jax@64", 0.5, ("mlp-distributed@64",)),
            Bar("mlp-jax+parts@64", 0.015, ("mlp-jax+parts@64",), "DLPack"),
        ),
        parts=("mlp-jax+parts@64",),
    ),
    "conv": Section(
        "Three convolutions, 64 images of 32x32 a rank",
        ("conv-jax@64", "conv-alone@64", "conv-all-reduce@64", "conv-distributed@64", "conv-torch@64", "conv-ddp@64"),
        (Bar("conv-jax@64", 1.2, ("conv-alone@64", "conv-all-reduce@64")),),
    ),
    "keras": Section(
        "Keras, 10 M parameters, 64 examples a rank",
        ("mlp-jax+parts@64", *(f"mlp-keras-{backend}+parts@64" for backend in BACKENDS)),
        (Bar("mlp-keras-jax+parts@64", 1.4, ("mlp-jax+parts@64",)),),
        parts=("mlp-jax+parts@64", *(f"mlp-keras-{backend}+parts@64" for backend in BACKENDS)),
    ),
    "fit": Section(
        "model.fit with DistributedOptimizer against the same model's recipe, 10 M parameters, 64 examples a rank",
        tuple(f"mlp-{how}-{backend}@64" for backend in BACKENDS for how in ("keras", "fit")),
        tuple(
            Bar(f"mlp-fit-{backend}@64", 1.6 if backend == "torch" else 1.4, (f"mlp-keras-{backend}@64",))
            for backend in BACKENDS
        ),
    ),
    "slow": Section(
        "Hosts joined at 1 Gbit/s, 10 M parameters, 64 examples a rank",
        ("mlp-jax+powersgd@64", "mlp-jax@64", "mlp-ddp@64", "mlp-distributed@64"),
        (Bar("mlp-jax+powersgd@64", 0.5, ("mlp-distributed@64",)),),
        rate=RATE,
    ),
}


def measure(section: Section, rounds: int, steps: int) -> dict[str, list[Turn]]:
    """The turns of each way, one of each round."""
    turns: dict[str, list[Turn]] = {way: [] for way in section.ways}
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(machines(section.rate, RANKS))
        ways = []
        for name in section.ways:
            ways.append(stack.enter_context(Way(name, RANKS, hosts)))
            ways[-1].take_turn(WARM_UP)
        for number in range(rounds):
            first = number % len(ways)
            for way in ways[first:] + ways[:first]:
                turns[way.name].append(way.take_turn(steps))
                milliseconds = statistics.median(turns[way.name][-1].seconds) * 1e3
                print(f"round {number + 1}  {way.name:32} {milliseconds:7.1f} ms", file=sys.stderr, flush=True)
    return turns


def find_ratios(bar: Bar, turns: dict[str, list[Turn]]) -> list[float]:
    """Of each round."""
    own = [turn.parts.get(bar.part, 0.0) if bar.part else statistics.median(turn.seconds) for turn in turns[bar.way]]
    others = [[statistics.median(turn.seconds) for turn in turns[way]] for way in bar.against]
    return [mine / sum(theirs) for mine, *theirs in zip(own, *others, strict=True)]


def tabulate(section: Section, turns: dict[str, list[Turn]]) -> list[Table]:
    """The steps, their parts, and what is expected of them."""
    rows = []
    for way in section.ways:
        seconds = [s * 1e3 for turn in turns[way] for s in turn.seconds]
        rounds = [statistics.median(turn.seconds) * 1e3 for turn in turns[way]]
        spread = f"{min(rounds):.1f}-{max(rounds):.1f}"
        rows.append([f"`{way}`", f"{min(seconds):.1f}", f"{statistics.median(seconds):.1f}", spread])
    count = f"{len(turns[section.ways[0]])} rounds of {len(turns[section.ways[0]][0].seconds)} steps"
    tables = [Table(["way", "least, ms", "median, ms", "medians of rounds, ms"], rows, f"{section.caption}; {count}.")]
    if section.parts:
        tables.append(tabulate_parts(section, turns))
    rows = []
    for bar in section.bars:
        ratios = find_ratios(bar, turns)
        found = statistics.median(ratios)
        spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
        verdict = "yes" if found <= bar.limit else "**no**"
        rows.append([bar.describe(), f"{bar.limit:g}", f"{found:.3f}", spread, verdict])
    columns = ["step / step", "at most", "median", "rounds", "held"]
    return [*tables, Table(columns, rows)] if rows else tables


def tabulate_parts(section: Section, turns: dict[str, list[Turn]]) -> Table:
    """Milliseconds of each part of a step, the median over the rounds."""
    rows = []
    for way in section.parts:
        found = [statistics.median(turn.parts.get(name, 0.0) for turn in turns[way]) for name in PARTS]
        rows.append([f"`{way}`", *(f"{seconds * 1e3:.2f}" for seconds in found)])
    return Table(["parts of a step, ms", *PARTS], rows)


def parse_sections(names: Sequence[str], ways: Sequence[str]) -> list[Section]:
    """The sections, without the ways that are not wanted. ways: those that are; none: all."""
    found = []
    for name in names:
        section = SECTIONS[name]
        kept = tuple(way for way in section.ways if not ways or way in ways)
        bars = tuple(bar for bar in section.bars if {bar.way, *bar.against} <= set(kept))
        parts = tuple(way for way in section.parts if way in kept)
        found.append(Section(section.caption, kept, bars, section.rate, parts))
    return [section for section in found if section.ways]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--ways", nargs="+", default=[], metavar="WAY", help="only these")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="measured steps a turn")
    parser.add_argument("--json", type=Path, help="file for the results, for tests/benchmarks/page.py")
    options = parser.parse_args()
    tables: list[Table] = []
    for section in parse_sections(options.sections, options.ways):
        tables += tabulate(section, measure(section, options.rounds, options.steps))
    publish(options.json, tables)


if __name__ == "__main__":
    main()
