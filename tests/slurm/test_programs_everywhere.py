"""Unchanged programs of other tools in every place: over ssh, in a real Slurm, and in jobs of other batch systems."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.programs.matrix import CASES, PROGRAMS, check_case, reason_to_skip
from tests.programs.places import PLACES, Place

pytestmark = [pytest.mark.usefixtures("machine_allows_slurm"), pytest.mark.timeout(400), pytest.mark.slow]


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with PLACES[request.param]() as place:
        yield place


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_runs_names_a_fault_and_is_stopped(place: Place, program: str, case: str) -> None:
    if why := reason_to_skip(place, program, case):
        pytest.skip(why)
    check_case(place, program, case)
