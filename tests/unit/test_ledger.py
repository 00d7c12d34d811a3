"""The ledger, against a model of what was really consumed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.cli.main import main
from hvdtrain.ledger.reader import find_segments, read_segment
from hvdtrain.ledger.rows import MAX_STEP_EXAMPLES, LedgerRow, hash_ids, sum_id_hashes
from hvdtrain.ledger.verify import LedgerVerification, verify_ledger
from hvdtrain.ledger.writer import Ledger, LedgerState
from hvdtrain.recipe import order
from hvdtrain.system.errors import UserError

Ids = order.Ids
Fault = Callable[[Ids], Ids]


@dataclass
class Training:
    """A run as the ledger sees it: three ranks that know of each step what was fed, and one that writes."""

    run_dir: Path
    examples: int
    batch: int
    seed: int = 0
    position: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])  # (epoch, offset) after each step
    saved: int = 0  # step of the checkpoint
    synced: dict[Path, int] = field(default_factory=dict)  # bytes of each segment that outlive the machine

    def __post_init__(self) -> None:
        self.start()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.ranks[0].close()

    def start(self) -> None:
        """All ranks begin at the checkpoint."""
        del self.position[self.saved + 1 :]
        self.ranks = [Ledger(self.seed, self.examples, self.batch, self.saved) for _ in range(3)]
        self.open()

    def open(self) -> None:
        self.ranks[0].open_for_writing(self.run_dir / "ledger")
        self.note_synced()

    def note_synced(self) -> None:
        self.synced[self.last] = self.last.stat().st_size

    @property
    def last(self) -> Path:
        return max(find_segments(self.run_dir / "ledger").items())[1]

    def step(self, fault: Fault = lambda ids: ids) -> None:
        """The ranks feed their parts of the next batch, or what a fault makes of it."""
        epoch, offset = self.position[-1]
        ids = next(order.iterate_batches(self.examples, self.batch, self.seed, epoch, offset))
        fed = fault(ids)
        told = [0, 0]
        for rank in range(3):
            mine = fed[slice(*order.part_bounds(len(fed), rank, 3))]
            told = [told[0] + len(mine), told[1] + sum_id_hashes(mine)]
        row = LedgerRow(len(self.position), epoch + 1, offset, *told)
        kept = self.ranks[0].durable_step
        for ledger in self.ranks:
            ledger.discard_rows(kept)
            ledger.append_row(row)
        end = offset + len(ids)
        self.position.append((epoch, end) if end < self.examples else (epoch + 1, 0))

    def save(self) -> None:
        self.ranks[0].make_durable()
        self.note_synced()
        self.saved = len(self.position) - 1

    def kill(self, torn: bytes, batch: int) -> None:
        """SIGKILL, perhaps in the middle of a line; then --resume, with another batch."""
        self.ranks[0].close()
        with self.last.open("ab") as file:
            file.write(torn)
        self.batch = batch
        self.start()

    def lose_writer(self, step: int) -> None:
        """Rank 0's machine dies, with what it had not synced; the next rank, told by a survivor, writes from `step`."""
        self.ranks[0].close()
        data = self.last.read_bytes()
        self.last.write_bytes(data[: self.synced[self.last]])
        state = LedgerState(**json.loads(json.dumps(asdict(self.ranks[1].to_state()))))
        self.ranks = [Ledger.from_state(state, {}) for _ in range(3)]
        self.roll_back(step)
        self.open()

    def roll_back(self, step: int) -> None:
        del self.position[step + 1 :]
        files = len(find_segments(self.run_dir / "ledger"))
        for ledger in self.ranks:
            ledger.roll_back(step)
        if len(find_segments(self.run_dir / "ledger")) > files:
            self.note_synced()

    def verdict(self) -> LedgerVerification:
        return verify_ledger(self.run_dir)


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[str, int, bytes]]:
    kinds = st.sampled_from(["step", "step", "step", "save", "kill", "lose", "roll"])
    torn = st.sampled_from([b"", b"7", b"12,1,64,8", b"3,1,16,8,12345", b"\0\0\0"])
    return draw(st.lists(st.tuples(kinds, st.integers(1, 40), torn), max_size=60))


def live(training: Training, events: list[tuple[str, int, bytes]]) -> None:
    for kind, number, torn in events:
        now = len(training.position) - 1
        if kind == "step":
            for _ in range(number % 5 + 1):
                training.step()
        elif kind == "save":
            training.save()
        elif kind == "kill":
            training.kill(torn, number)
        else:
            back = training.saved + number % (now - training.saved + 1)
            training.lose_writer(back) if kind == "lose" else training.roll_back(back)


@settings(deadline=None, max_examples=150)
@given(events=lives(), examples=st.integers(1, 100), batch=st.integers(1, 40), seed=st.integers(0, 9))
def test_any_sequence_of_faults_verifies_without_findings(
    events: list[tuple[str, int, bytes]], examples: int, batch: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, Training(Path(folder), examples, batch, seed) as training:
        live(training, events)
        verdict = training.verdict()
        assert verdict.findings == []
        epoch, offset = training.position[-1]
        assert (verdict.steps, verdict.epochs, verdict.rest) == (len(training.position) - 1, epoch, offset)
        assert verdict.segments == len(list(Path(folder).glob("ledger/*")))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), events=lives(), examples=st.integers(8, 100), batch=st.integers(4, 40))
def test_one_wrong_id_is_named_after_any_sequence_of_faults(
    data: st.DataObject, events: list[tuple[str, int, bytes]], examples: int, batch: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, Training(Path(folder), examples, batch) as training:
        live(training, events)
        kind = data.draw(st.sampled_from(["left out", "twice", "another"]))
        other = data.draw(st.integers(0, examples - 1))
        wrong: dict[str, list[int]] = {}

        def fault(ids: Ids) -> Ids:
            # Without the last one the others are a shorter range: then the next step is what is out of place.
            place = data.draw(st.integers(0, max(0, len(ids) - 2)))
            if kind == "twice":
                # One of its own: with the next one behind them, the ids are a longer range.
                twice = int(ids[place])
                wrong.update(missing=[], repeated=[twice])
                return np.append(ids, twice)
            if kind == "left out" and len(ids) > 1:
                wrong.update(missing=[int(ids[place])], repeated=[])
                return np.delete(ids, place)
            if ids[place] != other:
                wrong.update(missing=[int(ids[place])], repeated=[other])
            return np.concatenate([ids[:place], [other], ids[place + 1 :]])

        training.step(fault)
        at = len(training.position) - 1
        for _ in range(data.draw(st.integers(0, 5))):
            training.step()
        verdict = training.verdict()
        if not wrong:
            assert verdict.is_exactly_once
            return
        found = next(finding for finding in verdict.findings if finding.kind == "ids")
        assert (found.step, found.missing, found.repeated) == (at, wrong["missing"], wrong["repeated"])
        assert not [finding for finding in verdict.findings if finding.kind in ("step", "place", "file")]


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    """Of 100 examples, 16 a step: 7 steps an epoch."""
    with Training(tmp_path, 100, 16) as begun:
        yield begun


@pytest.fixture
def whole(training: Training) -> Training:
    """Two epochs and 32 examples of the third; two segments."""
    for _ in range(5):
        training.step()
    training.save()
    training.step()
    training.kill(b"7,1,96,", 16)
    while training.position[-1] != (2, 32):
        training.step()
    return training


def found(training: Training, kind: str) -> list[str]:
    return [finding.text for finding in training.verdict().findings if finding.kind == kind]


def edit(path: Path, change: Callable[[list[str]], object]) -> None:
    """Change the lines of a segment: 0 is the header."""
    lines = path.read_text().splitlines(keepends=True)
    change(lines)
    path.write_text("".join(lines))


def test_the_summary_says_what_is_not_complete(whole: Training) -> None:
    line = (
        "exactly once: 2 epochs x 100 examples and 32 examples of epoch 3, which is not complete, 16 steps (2 segments)"
    )
    assert whole.verdict().format_lines() == [line]


def test_a_missing_step_is_found(whole: Training) -> None:
    edit(whole.last, lambda lines: lines.pop(2 + 4))  # step 10 begins at 32 of epoch 2
    ids = np.sort(order.SampleOrder(100, 0, 1).ids_between(32, 48)).tolist()
    assert found(whole, "step") == ["step 10 is missing"]
    assert found(whole, "place") == ["step 11 begins at example 48 of epoch 2's order, expected 32 of epoch 2"]
    (epoch,) = (finding for finding in whole.verdict().findings if finding.kind == "epoch")
    assert (epoch.epoch, epoch.missing, epoch.repeated) == (2, ids[:10], [])
    names = ", ".join(map(str, ids[:10]))
    due = f"(id {ids[0]} was due after step 9)"
    assert epoch.text == f"epoch 2: ids {names} and 6 more not visited {due}"
    assert not whole.verdict().is_exactly_once


def test_a_repeated_step_is_found(whole: Training) -> None:
    edit(whole.last, lambda lines: lines.insert(7, lines[6]))
    ids = np.sort(order.SampleOrder(100, 0, 1).ids_between(32, 48)).tolist()
    assert found(whole, "step") == ["step 10 comes again after step 10"]
    (epoch,) = (finding for finding in whole.verdict().findings if finding.kind == "epoch")
    assert (epoch.epoch, epoch.missing, epoch.repeated) == (2, [], ids[:10])
    assert f"(id {ids[0]} in steps 10, 10)" in epoch.text


def test_a_wrong_offset_is_found(whole: Training) -> None:
    edit(whole.last, lambda lines: lines.__setitem__(6, lines[6].replace("10,2,32,", "10,2,31,")))
    assert "step 10 begins at example 31 of epoch 2's order, expected 32 of epoch 2" in found(whole, "place")


@pytest.mark.parametrize("column", range(5))
def test_any_number_changed_is_found(whole: Training, column: int) -> None:
    """Of any row: of any column, up or down, by a little or a lot."""
    text = whole.last.read_text()
    lines = text.splitlines()
    for at in range(2, len(lines)):
        for by in (-1, 1, 16, 10**9):
            row = [int(value) for value in lines[at].split(",")]
            row[column] += by
            if row[column] < 0:
                continue
            changed = ",".join(map(str, row))
            whole.last.write_text("\n".join([*lines[:at], changed, *lines[at + 1 :], ""]))
            assert not whole.verdict().is_exactly_once, (lines[at], changed)
    whole.last.write_text(text)
    assert whole.verdict().is_exactly_once


def test_ids_swapped_between_steps_are_found(whole: Training) -> None:
    """Each id was visited once, but not where the order says."""
    first, second = order.SampleOrder(100, 0, 2).ids_between(32, 48), order.SampleOrder(100, 0, 2).ids_between(48, 64)
    a, b = int(first[3]), int(second[5])
    whole.step(lambda ids: np.where(ids == a, b, ids))
    whole.step(lambda ids: np.where(ids == b, a, ids))
    assert found(whole, "ids") == [
        f"step 17 (epoch 3): id {a} not fed, id {b} fed instead",
        f"step 18 (epoch 3): id {b} not fed, id {a} fed instead",
    ]
    assert found(whole, "epoch") == []


def test_an_id_consumed_twice_is_found(whole: Training) -> None:
    again = int(order.SampleOrder(100, 0, 2).ids_between(0, 100)[3])
    whole.step(lambda ids: np.append(ids, again))
    whole.step()
    assert found(whole, "ids") == [f"step 17 (epoch 3): id {again} fed besides"]
    assert found(whole, "epoch") == [f"epoch 3: id {again} visited again (id {again} in steps 15, 17)"]


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_ranks_part_left_out_is_named(whole: Training, steps: int) -> None:
    """Also where it is the last step, and where the step ends the epoch."""
    for _ in range(steps):
        whole.step()
    epoch, offset = whole.position[-1]
    part = order.SampleOrder(100, 0, epoch).ids_between(0, 100)[offset + 6 : offset + 11]
    if steps == 5:
        assert (epoch, offset) == (3, 0)
    whole.step(lambda ids: ids[~np.isin(ids, part)])
    if steps == 1:
        whole.step()
    (finding,) = (finding for finding in whole.verdict().findings if finding.kind == "ids")
    assert sorted(finding.missing) == sorted(part.tolist())
    (finding,) = (finding for finding in whole.verdict().findings if finding.kind == "epoch")
    assert finding.missing == sorted(part.tolist())


def test_the_last_id_of_a_step_left_out_is_found(whole: Training) -> None:
    left = int(order.SampleOrder(100, 0, 2).ids_between(0, 100)[47])
    whole.step(lambda ids: ids[:-1])
    assert found(whole, "ids") == [f"step 17 (epoch 3): id {left} not fed"]
    whole.step()
    assert found(whole, "place") == ["step 18 begins at example 48 of epoch 3's order, expected 47 of epoch 3"]
    assert found(whole, "epoch") == [f"epoch 3: id {left} not visited (id {left} was due after step 17)"]


def test_the_last_step_of_an_epoch_with_too_many(whole: Training) -> None:
    while whole.position[-1][1] != 96:
        whole.step()
    whole.step(lambda ids: np.append(ids, 7))
    whole.step()
    assert found(whole, "ids") == ["step 21 (epoch 3): id 7 fed besides"]


def test_a_step_with_many_wrong_ids_is_reported_without_naming_them(whole: Training) -> None:
    whole.step(lambda ids: ids // 2)
    text = "step 17 (epoch 3): the 16 ids that were fed are not those of the order, and cannot be named"
    assert found(whole, "ids") == [text]


def test_another_seed_in_mid_epoch_is_found(whole: Training) -> None:
    whole.save()
    whole.seed = 1
    whole.kill(b"", 16)
    for _ in range(5):
        whole.step()
    (finding,) = whole.verdict().findings
    assert finding.kind == "epoch"
    assert finding.repeated and finding.missing


def test_another_seed_between_epochs_is_accepted(whole: Training) -> None:
    while whole.position[-1][1]:
        whole.step()
    whole.save()
    whole.seed = 1
    whole.kill(b"", 9)
    for _ in range(15):
        whole.step()
    assert whole.verdict().is_exactly_once


def test_steps_without_a_ledger_are_missing(training: Training) -> None:
    for _ in range(3):
        training.step()
    for _ in range(2):
        training.position.append((0, 16 * len(training.position)))  # with --no-ledger
    training.saved = 5
    training.kill(b"", 16)
    training.step()
    assert found(training, "step") == ["steps 4 to 5 are missing"]


def test_a_segment_lost_and_invalid_lines(whole: Training) -> None:
    whole.save()
    whole.kill(b"", 16)
    second = whole.run_dir / "ledger" / "segment-000002.csv"
    edit(second, lambda lines: lines.__setitem__(4, "8;2;0\n"))
    assert found(whole, "file") == ["segment-000002.csv: line 5 is not a valid row"]
    second.unlink()
    assert found(whole, "file") == ["segment-000002.csv is missing"]
    assert not whole.verdict().is_exactly_once


def test_a_lot_of_findings_are_cut(whole: Training) -> None:
    edit(whole.last, lambda lines: lines.__setitem__(0, lines[0].replace("seed=0", "seed=1")))
    lines = whole.verdict().format_lines()
    assert lines[0].startswith("not exactly once: 2 epochs x 100 examples")
    assert len(lines) == 12
    assert lines[-1].endswith(" more findings")


def test_rolling_back_before_what_was_durable(training: Training) -> None:
    for _ in range(9):
        training.step()
    training.save()
    training.step()
    training.roll_back(3)
    training.step()
    verdict = training.verdict()
    assert (verdict.findings, verdict.steps) == ([], 4)
    assert all(ledger.from_step == 3 and len(ledger.rows) == 1 for ledger in training.ranks)


def test_rows_are_forgotten_only_when_a_step_shows_that_they_are_durable(training: Training) -> None:
    training.step()
    training.save()
    assert [len(ledger.rows) for ledger in training.ranks] == [1, 1, 1]
    training.step()
    assert [[row.step for row in ledger.rows] for ledger in training.ranks] == [[2], [2], [2]]
    assert training.ranks[0].from_step == 1


@pytest.mark.parametrize("number", [errno.EFBIG, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EIO])
def test_rows_that_cannot_be_written_wait(training: Training, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = training.ranks[0]
    training.step()
    with monkeypatch.context() as patch:
        patch.setattr("hvdtrain.ledger.writer.os.write", lambda *_: fail(number))
        patch.setattr("hvdtrain.ledger.writer.create_atomically", lambda *_: fail(number))
        training.step()
        assert writer.error is not None and writer.error.errno == number
        with pytest.raises(OSError):
            training.save()
    training.save()
    verdict = training.verdict()
    assert (writer.error, verdict.findings, verdict.steps, verdict.segments) == (None, [], 2, 2)


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_a_ledger_in_a_run_folder_that_was_deleted_is_not_made_again(tmp_path: Path) -> None:
    ledger = Ledger(0, 10, 2)
    ledger.open_for_writing(tmp_path / "deleted" / "ledger")
    assert isinstance(ledger.error, FileNotFoundError)
    (tmp_path / "run").mkdir()
    ledger.open_for_writing(tmp_path / "run" / "ledger")
    assert ledger.error is None and ledger.is_segment_in_place()
    shutil.rmtree(tmp_path / "run")
    assert not ledger.is_segment_in_place()
    ledger.append_row(LedgerRow(1, 1, 0, 2, 3))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_loses_no_row(training: Training) -> None:
    """What cannot be written is in the next segment; a checkpoint has to wait."""
    writer = training.ranks[0]
    for _ in range(3):
        training.step()
    assert writer._file is not None
    os.close(writer._file)
    writer._file = os.open("/dev/full", os.O_WRONLY)
    training.step()
    assert writer.error is not None and "No space left" in str(writer.error)
    training.step()
    training.save()
    assert writer.error is None
    verdict = training.verdict()
    assert (verdict.findings, verdict.steps, verdict.segments) == ([], 5, 2)


def test_two_writers_never_take_the_same_segment(tmp_path: Path) -> None:
    """Twenty at the same time have twenty segments, all whole."""
    ledgers = [Ledger(0, 10, 2) for _ in range(20)]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(lambda ledger: ledger.open_for_writing(tmp_path), ledgers))
    for ledger in ledgers:
        ledger.append_row(LedgerRow(1, 1, 0, 2, 3))
        ledger.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"segment-{n:06}.csv" for n in range(1, 21)]
    assert all(len(read_segment(path).rows) == 1 for path in tmp_path.iterdir())


@given(ids=st.lists(st.integers(0, 2**40), unique=True, min_size=1), ranks=st.integers(1, 5))
def test_the_sum_of_hashes_is_the_same_on_any_number_of_ranks(ids: list[int], ranks: int) -> None:
    array = np.array(ids)
    parts = [array[slice(*order.part_bounds(len(ids), rank, ranks))] for rank in range(ranks)]
    told = np.float64(0)
    for part in parts:
        told += np.float64(sum_id_hashes(part))
    assert int(told) == sum_id_hashes(array) == sum(int(value) for value in hash_ids(array))


def test_hashes_are_splitmix64() -> None:
    """Its first outputs from seed 0 are known; id n gives the output of state n, which is output 1 of seed n."""
    assert hash_ids(np.array([0]))[0] == 0xE220A8397B1DCDAF >> 32
    assert len(np.unique(hash_ids(np.arange(10_000)))) == 10_000
    assert MAX_STEP_EXAMPLES * (2**32 - 1) < 2**53


def command(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["ledger", *args])
    said = capsys.readouterr()
    return left.value.code, said.out, said.err


def test_ledger_command_verifies_and_reports_a_missing_step(
    whole: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(whole.run_dir)
    code, out, _ = command(capsys, "verify", folder)
    assert code == 0
    assert out.startswith("exactly once: 2 epochs x 100 examples and 32 examples of epoch 3, which is not complete")
    code, out, _ = command(capsys, "verify", folder, "--json")
    values = json.loads(out)
    assert (code, values.pop("findings"), values.pop("exactly_once")) == (0, [], True)
    counts = {"epochs": 2, "examples": 100, "steps": 16, "segments": 2, "rest": 32}
    assert values == counts | {
        "as_ordered": True,
        "given_orders": 0,
        "shares": [],
        "owed": 0,
        "settled": 0,
        "staleness": None,
    }
    edit(whole.last, lambda lines: lines.pop(6))
    code, out, _ = command(capsys, "verify", folder)
    assert (code, out.splitlines()[1]) == (1, "step 10 is missing")
    code, out, _ = command(capsys, "verify", folder, "--json")
    values = json.loads(out)
    assert (code, values["exactly_once"], values["findings"][0]["kind"]) == (1, False, "step")


def test_no_ledger_and_damaged_headers(whole: Training, capsys: pytest.CaptureFixture[str]) -> None:
    empty = whole.run_dir / "ledger"
    error = f"hvdtrain: error: {empty} has no ledger: there is no {empty}/ledger/segment-000001.csv\n"
    assert command(capsys, "verify", str(empty)) == (2, "", error)
    text = whole.last.read_text()
    damaged = f"{whole.last} is not a ledger segment of this version of hvdtrain: "
    damaged += "expected a header of format 'hvdtrain ledger 2'"
    for wrong in (text.replace("ledger 2", "ledger 9"), text.replace("seed=0", "seed="), text[:20], "", text[70:]):
        whole.last.write_text(wrong)
        assert command(capsys, "verify", str(whole.run_dir)) == (2, "", f"hvdtrain: error: {damaged}\n")
    with pytest.raises(UserError):
        verify_ledger(whole.run_dir)
    for wrong in (
        "seed=18446744073709551616",
        "seed=0 examples=100000000000000000000",
        "seed=0 examples=10000000000000000",
    ):
        whole.last.write_text(re.sub("seed=0 examples=100" if "ex" in wrong else "seed=0", wrong, text))
        code, out, error = command(capsys, "verify", str(whole.run_dir))
        assert (code, out, error.count("\n")) == (1, "", 1)
        assert error.startswith("hvdtrain: error: segment-00000")
    assert command(capsys) == (2, "", "hvdtrain: error: `hvdtrain ledger` needs a command: verify\n")
