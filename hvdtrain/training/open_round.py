"""The open round of local steps in an elastic run: what a lost rank takes along, and who is to train it again.

In a round each rank changes weights of its own, from the examples that were dealt to it. When a rank is lost, nobody
rolls back: the others keep what they have changed, and compare what that was made of.

    fed     positions of the epoch's order that the steps of the round have consumed, the same on all ranks
    own     those of them whose change this rank has
    lost    fed - the union of all ranks' own: nobody has their change; they are owed by the run to its epoch
            (Position.owed), and the next steps of the epoch are made of them, before the order continues

So a rank that has left in any way, one that has not finished a step that others have, and one that comes in the midst
of a round, are the same case. A rank that has not seen the end of a round that another one has finished takes the new
weights from that one: its change is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hvdtrain.comm import collectives
from hvdtrain.recipe.ranges import Ranges, count_positions, join_ranges, slice_ranges, subtract_ranges
from hvdtrain.training.plan import StepShare
from hvdtrain.training.position import Position


@dataclass(frozen=True)
class RoundReport:
    """What a rank brings into a new world."""

    step: int  # that its state has reached; -1: it has no state
    number: int  # of its round
    own: Ranges


@dataclass
class OpenRound:
    """A rank's knowledge of the open round.

    Attributes:
        number: the rounds that have ended in this process or in those that it has joined.
        steps: local steps since then; 0: no round is open.
        fed: positions of the epoch's order that they have consumed, without what was lost.
        own: those whose change this rank has.
    """

    number: int = 0
    steps: int = 0
    fed: Ranges = field(default_factory=list)
    own: Ranges = field(default_factory=list)

    def record_step(self, position: Position, share: StepShare, *, is_skipped: bool) -> None:
        """Count a local step that is committed; `position` is before it."""
        self.steps += 1
        if is_skipped:  # it has changed nothing
            return
        all_positions = share.owed or [[position.offset, position.offset + share.step_examples]]
        own = slice_ranges(all_positions, share.first_index, share.first_index + share.own_examples)
        self.fed, self.own = join_ranges(self.fed, all_positions), join_ranges(self.own, own)

    def end_round(self) -> None:
        """Let the next round begin."""
        self.number, self.steps, self.fed, self.own = self.number + 1, 0, [], []

    def start_run(self) -> None:
        """Forget everything: the run begins, or continues from a checkpoint."""
        self.number, self.steps, self.fed, self.own = 0, 0, [], []

    # A new world.

    def gather_reports(self, position: Position | None) -> list[RoundReport]:
        """Return what each rank of a new world has, by rank; all ranks call this. position: of this rank's state."""
        own = [-1, 0, []] if position is None else [position.step, self.number, self.own]
        return [RoundReport(*report) for report in collectives.gather_json(own, "regroup.rounds")]

    def to_json(self) -> list[object]:
        """Return what is the same on all ranks, as plain data."""
        return [self.number, self.steps, self.fed]

    def follow(self, farthest: Sequence[object], report: RoundReport) -> bool:
        """Be in the round of the rank that is farthest; return whether this rank keeps what it has changed in it.

        Args:
            farthest: `to_json` of that rank.
            report: this rank's.
        """
        number, steps, fed = farthest
        keeps = report.step >= 0 and report.number == number and bool(number or steps)
        self.number, self.steps, self.fed = number, steps, fed  # type: ignore[assignment]
        self.own = self.own if keeps else []
        return keeps

    def find_lost(self, reports: Sequence[RoundReport], position: Position) -> Ranges:
        """Return the positions whose change nobody has; `position` owes them from now on."""
        kept = [report.own for report in reports if report.step >= 0 and report.number == self.number]
        lost = subtract_ranges(self.fed, join_ranges(*kept))
        self.fed = subtract_ranges(self.fed, lost)
        position.owed = join_ranges(position.owed, lost)
        position.samples -= count_positions(lost)
        return lost


def find_farthest(reports: Sequence[RoundReport]) -> int:
    """Return the first rank whose state is farthest: by its steps, then by the rounds that it has finished."""
    places = [(report.step, report.number) for report in reports]
    return places.index(max(places))
