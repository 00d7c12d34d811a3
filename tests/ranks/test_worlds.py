"""Kept worlds: what one test does on the ranks does not reach the next."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

import hvdtrain
from hvdtrain.comm import collectives
from hvdtrain.system.errors import UserError
from tests.support.worlds import KeptWorld, RanksFailed, train

EXACT = f"{Path(__file__).parent / 'exact_recipe.py'}:Exact"


def sum_of_ranks(added: int) -> tuple[int, int]:
    world = hvdtrain.init()
    values = torch.tensor([world.rank + added], dtype=torch.int64)
    collectives.wait(collectives.all_reduce_async_(values, "test.sum"))
    return os.getpid(), int(values)


def test_all_ranks_run_a_function_and_stay(world2: KeptWorld, world3: KeptWorld) -> None:
    for world, expected in ((world2, 21), (world3, 33)):
        first, second = world.run(sum_of_ranks, 10), world.run(sum_of_ranks, 10)
        assert first == second
        assert len({pid for pid, _ in first}) == world.size
        assert {total for _, total in first} == {expected}


def disturb() -> tuple[float, str, str]:
    """Change what a process shares, and return what was found."""
    found = float(torch.rand(())), str(Path.cwd()), os.environ.get("DISTURBED", "no")
    os.environ["DISTURBED"] = "yes"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    return found


def test_a_call_leaves_no_trace(world2: KeptWorld) -> None:
    assert world2.run(disturb) == world2.run(disturb)
    assert world2.run(os.getcwd, cwd=Path("/usr")) == ["/usr", "/usr"]
    assert world2.run(os.getenv, "SHOWN", env={"SHOWN": "1"}) == ["1", "1"]
    assert world2.run(os.getenv, "SHOWN") == [None, None]


def fail_on_rank_1(error: type[Exception]) -> None:
    print("something to show")
    if hvdtrain.init().rank == 1:
        three = 3
        assert three == 4
    raise error("of rank 0")


def test_a_failure_shows_every_rank_and_the_next_call_has_a_new_world(world2: KeptWorld) -> None:
    before = world2.run(os.getpid)
    with pytest.raises(RanksFailed) as found:
        world2.run(fail_on_rank_1, KeyError)
    for text in ("rank 0 of 2", "KeyError: 'of rank 0'", "rank 1 of 2", "assert 3 == 4", "something to show"):
        assert text in str(found.value)
    assert not set(before) & set(world2.run(os.getpid))


def refuse(text: str) -> None:
    collectives.barrier("refuse")
    raise UserError(text)


def test_refusals_by_all_ranks_leave_the_world(world2: KeptWorld) -> None:
    before = world2.run(os.getpid)
    assert [str(error) for error in world2.errors(refuse, "not so")] == ["not so", "not so"]
    assert world2.run(os.getpid) == before
    with pytest.raises(RanksFailed, match="assert 3 == 4"):
        world2.errors(fail_on_rank_1, UserError)
    with pytest.raises(RanksFailed, match="returned None"):
        world2.errors(time.sleep, 0)


def hang_on_rank_0(how: str) -> None:
    if hvdtrain.init().rank == 0:
        os._exit(3) if how == "die" else time.sleep(600)


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_rank_that_dies_or_hangs_fails_the_test_only(how: str, world2: KeptWorld) -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 of 2: died, or did not return") as found:
        world2.run(hang_on_rank_0, how, timeout=3)
    assert ("hang_on_rank_0" in str(found.value).partition("--- stacks")[2]) == (how == "hang")
    assert len(world2.run(os.getpid)) == 2


def test_training_with_a_command_lines_options(world2: KeptWorld, tmp_path: Path) -> None:
    summary = train(world2, EXACT, tmp_path / "run", "--steps", "3")
    assert (summary["steps"], summary["world_size"]) == (3, 2)
    assert (tmp_path / "run" / "summary.json").exists()
    assert "run folder" in world2.printed[0] and not world2.printed[1]
