"""When an elastic run that makes no progress is given up."""

from __future__ import annotations

import pytest

from hvdtrain.elastic.records import TrainingError, WorkerDeath
from hvdtrain.elastic.tries import MAX_TRIES, MAX_TRIES_PER_STEP, count_tries, describe_exit_code


def deaths(*ends: tuple[int, int]) -> dict[str, WorkerDeath]:
    """Of workers in these generations, after so many steps."""
    return {
        f"m{number}": WorkerDeath(generation, steps, "was killed by signal 11 (SIGSEGV)", "computing gradients", "b")
        for number, (generation, steps) in enumerate(ends)
    }


def test_the_same_step_not_passed_in_three_tries() -> None:
    began = {"1": 0}
    for generation in range(1, MAX_TRIES_PER_STEP):
        began[str(generation)] = 0
        tries = count_tries(deaths(*((g, 4) for g in range(1, generation + 1))), {}, began)
        assert tries.count == tries.count_at_step == generation and not tries.should_give_up
    began["3"] = 0
    tries = count_tries(deaths((1, 4), (1, 4), (2, 4), (3, 4)), {}, began)
    assert tries.should_give_up
    assert tries.text == (
        "step 5 was not passed in 3 tries; in the last one, a worker on b was killed by signal 11 (SIGSEGV) "
        "while it was computing gradients"
    )


def test_back_off_between_tries() -> None:
    pauses = [count_tries(deaths(*((g, 4) for g in range(1, n + 1))), {}, {}).next_try_delay() for n in range(1, 9)]
    assert pauses == [0, 2, 4, 8, 16, 30, 30, 30]


@pytest.mark.parametrize(
    "ends",
    [
        [(1, 4), (2, 9), (3, 9), (4, 12)],  # farther each time, or in the next
        [(generation, 3 * generation) for generation in range(1, 50)],
        [(1, 100), (2, 40), (3, 60)],  # all killed three times, at different steps
    ],
)
def test_preemptions_at_different_steps_do_not_count(ends: list[tuple[int, int]]) -> None:
    assert not count_tries(deaths(*ends), {}, {}).should_give_up


def test_a_checkpoint_is_progress() -> None:
    """Each try dies at another step before the farthest one, and begins with a newer checkpoint."""
    began = {str(generation): 10 * generation for generation in range(1, 30)}
    assert not count_tries(deaths((1, 500), *((g, 10 * g + 5) for g in range(2, 30))), {}, began).should_give_up


def test_no_progress_at_all_at_different_steps() -> None:
    ends = [(1, 100), *((generation, 10 + generation) for generation in range(2, MAX_TRIES + 1))]
    assert not count_tries(deaths(*ends[:-1]), {}, {}).should_give_up
    assert count_tries(deaths(*ends), {}, {}).should_give_up


def test_errors_whose_text_differs_count_as_well() -> None:
    errors = {f"{generation}-m": TrainingError(4, f"object at 0x{generation}") for generation in (1, 2, 3)}
    tries = count_tries({}, errors, {"1": 0, "2": 0, "3": 0})
    assert tries.should_give_up and tries.text == "step 5 was not passed in 3 tries; in the last one, object at 0x3"


def test_generations_without_a_death_end_a_row() -> None:
    """A newcomer was taken in between, and steps were made."""
    assert count_tries(deaths((1, 4), (2, 4), (4, 4)), {}, {"1": 0, "2": 0, "3": 4, "4": 9}).count == 1


def test_no_deaths_count_no_tries_and_no_pause() -> None:
    assert count_tries({}, {}, {}).count == 0 and count_tries({}, {}, {"1": 0}).next_try_delay() == 0


def test_how_a_process_ended_in_words() -> None:
    assert describe_exit_code(0) == "ended with code 0"
    assert describe_exit_code(9) == "ended with code 9"
    assert describe_exit_code(-11) == "was killed by signal 11 (SIGSEGV)"
    assert describe_exit_code(-9) == "was killed by signal 9 (SIGKILL; probably by the out-of-memory killer)"
