"""From one generation of an elastic run to the next: a new world, and one state for all of it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from hvdtrain.comm import collectives, world
from hvdtrain.comm.world import World
from hvdtrain.elastic.membership import Membership
from hvdtrain.recipe.framework import Step
from hvdtrain.system import activity
from hvdtrain.training.checkpoint import Position


def enter_next_world(
    membership: Membership, step: Step, at: Position | None, known: dict[str, Any]
) -> tuple[World, Position | None, dict[str, Any]]:
    """Leave the present world and enter the next generation's, with the state of the rank that is farthest.

    at: where this rank's state belongs, None where it has none. known: small things that go with it, for JSON.
    Returns the world, where its state belongs and what goes with it; None and this rank's own where nobody has a state.
    """
    while True:
        began = time.perf_counter()
        # Nothing of the old world may be waited for: some of it is gone.
        world.shut_down_horovod()
        with activity.temporary_activity("waiting for enough ranks", waits=True, endless=True):
            place = membership.form_next_generation(at.step if at is not None else -1)
        activity.enter_activity("meeting the other ranks", patient=True)
        try:
            new = world.enter_world(place.horovod_environment())
            step.switch_world(new)
            met = time.perf_counter()
            if place.step < 0:
                return new, None, known
            mine = [asdict(at), known] if at is not None and new.rank == place.root else None
            position, known_to_root = collectives.broadcast_json(mine, "regroup.position", place.root)
            state = step.local_state() if new.rank == place.root else None
            state = collectives.broadcast_bytes(state, "regroup.state", place.root)
            collectives.barrier("regroup.end")
        except collectives.PeersLost:
            continue
        step.load_state(state)
        membership.formation_text = f"ranks met in {met - began:.3f} s, state in {time.perf_counter() - met:.3f} s"
        return new, Position(**position), known_to_root
