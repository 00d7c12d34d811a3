"""`hvdtrain plan` up to the step: what it refuses in one line."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from hvdtrain.cli.main import main

MLP = str(Path(__file__).parents[2] / "recipes" / "mlp.py")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (f"--memory 4X {MLP}", "'4X' is not a size in bytes; expected for example 4096, 64K or 16M"),
        (f"{MLP} --shard optimizer", "--shard is one of the layouts that are printed: leave it out"),
        (f"{MLP} --mirror 1", "--mirror is one of the layouts that are printed: leave it out"),
        (f"{MLP} --local-steps 4", "hvdtrain plan does not count what --local-steps keeps: leave it out"),
        (f"{MLP} --deterministic", "hvdtrain plan does not count what --deterministic keeps: leave it out"),
        (f"{MLP} --prune 0.8,from:1ep,to:2ep", "hvdtrain plan does not count what --prune keeps: leave it out"),
        (f"{MLP} --shard-ranks 2", "hvdtrain plan does not count what --shard-ranks keeps: leave it out"),
        (f"{MLP} --compression auto", "--compression auto chooses a method by its time: name one, for example int8"),
        (f"-np 0 {MLP}", "Invalid value for '-np' / '--ranks': 0 is not in the range 1<=x<=1024."),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", *shlex.split(arguments)])
    assert left.value.code == 2
    assert capsys.readouterr().err == f"hvdtrain: error: {error}\n"


def test_a_launched_rank_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_RANK", "0")
    with pytest.raises(SystemExit) as left:
        main(["plan", MLP])
    assert left.value.code == 2
    assert "start it without a launcher, with -np N" in capsys.readouterr().err
