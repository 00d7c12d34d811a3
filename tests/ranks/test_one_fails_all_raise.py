"""`collectives.on_root` and `all_or_none`: what one rank cannot do, no rank does, and all raise the same."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.system.errors import KnownError, RunError, UserError
from tests.ranks.harness import run

HERE = socket.gethostname()


def outcome(function: Callable[[], Any]) -> list[Any]:
    """What a function returned, or its error's class, text and origin."""
    try:
        return ["returned", function()]
    except Exception as error:
        return [type(error).__name__, str(error), error.origin if isinstance(error, KnownError) else None]


def raising(error: Exception) -> Any:
    raise error


def on_this_rank() -> dict[str, list[Any]]:
    """All ways in which the helpers can end, on this rank."""
    import hvdtrain
    from hvdtrain.comm import collectives

    rank = hvdtrain.init().rank
    return {
        "root returns": outcome(lambda: collectives.on_root("a", lambda: {"rank": rank})),
        "rank 1 is the root": outcome(lambda: collectives.on_root("b", lambda: rank, root=1)),
        "root is refused": outcome(lambda: collectives.on_root("c", lambda: raising(UserError("no folder")))),
        "root fails": outcome(lambda: collectives.on_root("d", lambda: raising(RunError("disk full")))),
        "root has a bug": outcome(lambda: collectives.on_root("e", lambda: raising(ValueError("bug")))),
        "all return": outcome(lambda: collectives.on_all_ranks("f", lambda: rank)),
        "rank 1 is refused": outcome(
            lambda: collectives.on_all_ranks("g", lambda: raising(UserError("no file")) if rank == 1 else rank)
        ),
        "both are refused alike": outcome(lambda: collectives.on_all_ranks("h", lambda: raising(UserError("empty")))),
        "both are refused": outcome(lambda: collectives.on_all_ranks("i", lambda: raising(UserError(f"{rank} files")))),
        "rank 1 has a bug": outcome(
            lambda: collectives.on_all_ranks("j", lambda: raising(KeyError("bug")) if rank == 1 else rank)
        ),
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("outcomes")
    done = run("horovodrun", 2, [sys.executable, "-m", __name__, str(folder)])
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / str(rank)).read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("root returns", ["returned", {"rank": 0}]),
        ("rank 1 is the root", ["returned", 1]),
        ("root is refused", ["UserError", "no folder", 0]),
        ("root fails", ["RunError", "disk full", 0]),
        ("rank 1 is refused", ["UserError", f"rank 1 on {HERE}: no file", 1]),
        ("both are refused alike", ["UserError", "empty", 0]),
        ("both are refused", ["UserError", f"rank 0 on {HERE}: 0 files", 0]),
    ],
)
def test_all_ranks_end_alike(outcomes: list[dict[str, list[Any]]], case: str, expected: list[Any]) -> None:
    assert [outcome[case] for outcome in outcomes] == [expected, expected]


def test_all_ranks_keep_their_own_result(outcomes: list[dict[str, list[Any]]]) -> None:
    assert [outcome["all return"] for outcome in outcomes] == [["returned", 0], ["returned", 1]]


@pytest.mark.parametrize(
    ("case", "origin", "error", "text"),
    [("root has a bug", 0, "ValueError", "bug"), ("rank 1 has a bug", 1, "KeyError", "'bug'")],
)
def test_an_unexpected_error_stays_itself_where_it_happened(
    outcomes: list[dict[str, list[Any]]], case: str, origin: int, error: str, text: str
) -> None:
    assert outcomes[origin][case] == [error, text, None]
    assert outcomes[1 - origin][case] == ["RunError", f"rank {origin} on {HERE}: {error}: {text}", origin]


if __name__ == "__main__":
    from hvdtrain.comm.world import init

    outcomes_here = on_this_rank()
    (Path(sys.argv[1]) / str(init().rank)).write_text(json.dumps(outcomes_here))
