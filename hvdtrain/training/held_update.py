"""The update of a step in an elastic run whose ranks have different parts, which not only some of them may make.

    all_reduce      this rank has its sums
    hold            barrier: all ranks have theirs
    update          no exchange is in it

That is so in a grid, and with dealt tables. If no rank has passed the barrier when one is lost, all go on as before the
step. If one has, all that are left have their sums, and those that did not pass make the update in the next world: in a
grid ranks of a column have the same state, but those of one column may all have failed in the barrier, and then none
could send the new state to the others; rows of a table are on two ranks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hvdtrain.comm import collectives

T = TypeVar("T")


@dataclass
class HeldUpdate:
    """The update of a step that this rank can make, and has not begun.

    Attributes:
        update: it, or None.
        steps_ahead: 1 once it was made late, until the position in the run is taken over from another rank.
    """

    update: Callable[[], object] | None = None
    steps_ahead: int = 0

    def make_together(self, update: Callable[[], T]) -> T:
        """Make an update once all ranks can. Raises PeersLost if one is lost before, and then holds the update."""
        self.update = update
        collectives.barrier("step.held")
        self.update = None
        return update()

    def settle(self, reached: int, farthest: int) -> int:
        """Make the update that is held if another rank has made its own, else drop it; return the step reached then.

        Args:
            reached: the step that this rank's state has reached.
            farthest: that of the rank that is farthest.
        """
        update, self.update = self.update, None
        if update is None or farthest <= reached:
            return reached
        update()
        self.steps_ahead = 1
        return reached + 1
