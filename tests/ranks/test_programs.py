"""Unchanged programs of other tools under `hvdtrain launch` on this host; tests/slurm has them in all places."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.programs.matrix import PROGRAMS, check_case
from tests.programs.places import PLACES, Place


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    with PLACES["this host"]() as place:
        yield place


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unchanged_program_runs_to_its_end_on_two_ranks(program: str, here: Place) -> None:
    check_case(here, program, "run")


def test_the_rank_that_raises_is_named_once_although_the_other_one_fails_with_it(here: Place) -> None:
    check_case(here, "horovod_torch", "fault")


def test_ctrl_c_ends_a_program_and_leaves_nothing(here: Place) -> None:
    check_case(here, "torch_ddp", "ctrl-c")
