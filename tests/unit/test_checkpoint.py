"""Checkpoints are loaded whole or named as damaged, whatever happened to their bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvdtrain.system.errors import UserError
from hvdtrain.training import checkpoint
from hvdtrain.training.checkpoint import prune_checkpoints, read_newest_checkpoint, write_checkpoint
from hvdtrain.training.position import Position

STATE = bytes(range(256)) * 4


def position(step: int) -> Position:
    return Position(
        step=step, epoch=1, offset=2, samples=8 * step, train_loss=0.25, eval={"loss": 0.5}, evaluated=step, examples=40
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    for step in (10, 20):
        write_checkpoint(tmp_path, position(step), STATE, "mine")
    return tmp_path


def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-20"


def test_what_was_saved_is_loaded(run_dir: Path) -> None:
    found = read_newest_checkpoint(run_dir, "mine")
    assert found is not None
    assert (found.position, found.state, found.damage_reports) == (position(20), STATE, [])
    assert read_newest_checkpoint(run_dir / "other", "mine") is None


def test_an_evaluation_that_was_not_finite_is_null_in_json_and_nan_again(run_dir: Path) -> None:
    at = position(30)
    at.eval = {"loss": math.nan, "perplexity": math.inf, "accuracy": 0.5}
    meta = json.loads((write_checkpoint(run_dir, at, STATE, "mine") / "meta.json").read_text())
    assert meta["position"]["eval"] == {"loss": None, "perplexity": None, "accuracy": 0.5}
    found = read_newest_checkpoint(run_dir, "mine")
    assert found is not None
    assert [math.isnan(value) for value in found.position.eval.values()] == [True, True, False]
    prune_checkpoints(run_dir, 1, ("loss", "min"))
    assert (run_dir / "checkpoints" / "best").resolve().name == "step-10"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(data=st.data())
def test_any_change_of_any_byte_is_damage(run_dir: Path, data: st.DataObject) -> None:
    path = newest(run_dir) / data.draw(st.sampled_from(["state", "meta.json"]))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "insert", "remove", "append", "replace"]))
    some = data.draw(st.binary(min_size=1, max_size=20))
    changed = {
        "flip": whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :],
        "cut": whole[:at],
        "insert": whole[:at] + some + whole[at:],
        "remove": whole[:at] + whole[at + len(some) :],
        "append": whole + some,
        "replace": some,
    }[change]
    if changed == whole:
        return
    path.write_bytes(changed)
    try:
        with pytest.raises(UserError) as refused:
            read_newest_checkpoint(run_dir, "mine")
        offer = f"step-10 is not damaged; to resume from it: rm -r {newest(run_dir)}"
        assert str(refused.value).startswith(f"{newest(run_dir)} ") and str(refused.value).endswith(offer)
        assert "\n" not in str(refused.value)
        taken = read_newest_checkpoint(run_dir, "mine", unattended=True)
        assert taken is not None and taken.position.step == 10
        assert taken.damage_reports == [str(refused.value).partition("; step-10")[0]]
    finally:
        path.write_bytes(whole)


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change what meta.json says, with a checksum that is right: what another hvdtrain might have written."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "meta.json").read_text())
        del content["sha256"]
        change(content)
        (folder / "meta.json").write_bytes(checkpoint.encode_with_digest(content))

    return apply


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (rewrite(lambda c: c.update(extra=1)), "damaged: its meta.json has an unknown entry extra"),
        (rewrite(lambda c: c["position"].update(more=1)), "has an unknown entry position.more"),
        (rewrite(lambda c: c["position"].pop("epoch")), "lacks position.epoch"),
        (rewrite(lambda c: c.pop("recipe")), "lacks recipe"),
        (rewrite(lambda c: c["position"].update(step="20")), "has '20' as position.step; expected an integer from 0"),
        (rewrite(lambda c: c["position"].update(samples=-1)), "has -1 as position.samples"),
        (rewrite(lambda c: c["position"].update(offset=True)), "has True as position.offset"),
        (rewrite(lambda c: c["position"].update(seed=1.5)), "has 1.5 as position.seed"),
        (
            rewrite(lambda c: c["position"].update(train_loss=None)),
            "has None as position.train_loss; expected a finite",
        ),
        (rewrite(lambda c: c["position"].update(owed=[[4, 2]])), "has [[4, 2]] as position.owed; expected sorted"),
        (rewrite(lambda c: c["position"].update(owed=[4, 2])), "has no list of ranges 'position.owed'"),
        (rewrite(lambda c: c["position"].update(eval=[])), "has no object 'position.eval'"),
        (rewrite(lambda c: c["position"]["eval"].update(loss="low")), "has 'low' as position.eval"),
        (rewrite(lambda c: c["position"].update(step=19)), "is that of step 19"),
        (rewrite(lambda c: c.update(position=None)), "has no object 'position'"),
        (rewrite(lambda c: c["files"]["state"].update(bytes="9")), "has '9' as files.state.bytes"),
        (rewrite(lambda c: c.update(format=7)), "is not of the format 'hvdtrain checkpoint 2'"),
        (rewrite(lambda c: c.update(format="hvdtrain checkpoint 3")), "has the format 'hvdtrain checkpoint 3'; this"),
        (lambda folder: (folder / "meta.json").unlink(), "its meta.json cannot be read: No such file or directory"),
        (lambda folder: (folder / "state").unlink(), "its state cannot be read: No such file or directory"),
        (lambda folder: (folder / "meta.json").write_text("[" * 10**6), "its meta.json is not valid JSON"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "its meta.json is not an object"),
        (lambda folder: (folder / "state").write_bytes(STATE[:100]), "its state has 100 of 1024 bytes"),
    ],
)
def test_damage_is_named_in_one_line_with_the_checkpoint_before(
    run_dir: Path, damage: Callable[[Path], object], text: str
) -> None:
    damage(newest(run_dir))
    with pytest.raises(UserError) as refused:
        read_newest_checkpoint(run_dir, "mine")
    assert text in str(refused.value)
    assert str(refused.value).endswith(f"; step-10 is not damaged; to resume from it: rm -r {newest(run_dir)}")


def test_of_several_damaged_ones_all_are_passed_over_or_none_is_left(run_dir: Path) -> None:
    write_checkpoint(run_dir, position(30), STATE, "mine")
    for step in (20, 30):
        (run_dir / "checkpoints" / f"step-{step}" / "state").write_bytes(b"")
    found = read_newest_checkpoint(run_dir, "mine", unattended=True)
    assert found is not None and found.position.step == 10
    assert [text.partition(" is damaged")[0][-7:] for text in found.damage_reports] == ["step-30", "step-20"]
    (run_dir / "checkpoints" / "step-10" / "state").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-30 is damaged: .*; no earlier checkpoint is intact"):
        read_newest_checkpoint(run_dir, "mine", unattended=True)


def test_another_recipe_is_refused_also_if_nobody_is_there(run_dir: Path) -> None:
    for unattended in (False, True):
        with pytest.raises(UserError, match="is a checkpoint of recipe 'mine', not of 'other'"):
            read_newest_checkpoint(run_dir, "other", unattended=unattended)


def write_format_1(run_dir: Path, step: int, /, drop: tuple[str, ...] = ("rows",), **changed: Any) -> Path:
    """A checkpoint as hvdtrain 0.1 wrote it."""
    folder = run_dir / "checkpoints" / f"step-{step}"
    folder.mkdir()
    (folder / "state").write_bytes(STATE)
    content = {name: value for name, value in asdict(position(step)).items() if name not in drop} | changed
    meta = {
        "format": "hvdtrain checkpoint 1",
        "recipe": "mine",
        "position": content,
        "state_bytes": len(STATE),
        "state_sha256": hashlib.sha256(STATE).hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return folder


def test_checkpoints_of_the_first_format_are_loaded(run_dir: Path) -> None:
    write_format_1(run_dir, 30, eval={"loss": math.nan})
    found = read_newest_checkpoint(run_dir, "mine")
    assert found is not None
    assert (found.position.step, found.position.rows, math.isnan(found.position.eval["loss"])) == (30, None, True)
    write_format_1(run_dir, 40, drop=("rows", "evaluated", "saved", "examples", "seed"))
    found = read_newest_checkpoint(run_dir, "mine")
    assert found is not None and (found.position.step, found.position.examples) == (40, 0)


@pytest.mark.parametrize("changed", [{"step": "30"}, {"offset": -1}, {"other": 1}, {"train_loss": math.nan}])
def test_what_is_wrong_in_the_first_format_is_damage(run_dir: Path, changed: dict[str, Any]) -> None:
    write_format_1(run_dir, 30, **changed)
    with pytest.raises(UserError, match=r"step-30 is damaged: its meta.json has .*; step-20 is not damaged"):
        read_newest_checkpoint(run_dir, "mine")


def test_names_that_are_no_steps_are_not_checkpoints(run_dir: Path) -> None:
    for name in ("step-²", "step-007", "step-", "step--1", "step-1e3", "step-99999999999999999999"):
        shutil.copytree(newest(run_dir), run_dir / "checkpoints" / name)
    (run_dir / "checkpoints" / "step-50").write_text("a file")
    assert [path.name for path in checkpoint.list_checkpoints(run_dir)] == ["step-10", "step-20"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    run_dir: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(number, "no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError):
            write_checkpoint(run_dir, position(30), STATE, "mine")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-10", "step-20"]


def test_a_run_that_lost_its_folder_leaves_the_checkpoints_of_the_other(run_dir: Path) -> None:
    def refuse() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError):
        write_checkpoint(run_dir, position(20), b"other", "mine", refuse)
    found = read_newest_checkpoint(run_dir, "mine")
    assert found is not None and found.state == STATE
    assert not list((run_dir / "checkpoints").glob(".*"))
