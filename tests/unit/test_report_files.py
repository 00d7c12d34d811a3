"""Files that a run appends to: what cannot be written waits, and what is read back on resume is announced."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvdtrain.diagnosis.report import WorldHistory
from hvdtrain.ledger.rows import LedgerRow
from hvdtrain.ledger.writer import Ledger, LedgerState
from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.metrics import Metric, ScoreLayout
from hvdtrain.system import files
from hvdtrain.system.files import BufferedAppender, create_atomically, write_atomically
from hvdtrain.training.metrics import RecipeMetrics
from hvdtrain.training.options import ReportOptions
from hvdtrain.training.position import Position
from hvdtrain.training.progress import Progress
from hvdtrain.training.reporter import Reporter, StepReport
from hvdtrain.training.rows import MetricsRow, RowCutResult, cut_rows, find_ledger_gap
from hvdtrain.training.speed import StepTime

METRICS = RecipeMetrics(Recipe(), ScoreLayout((Metric("loss"),)))
ERRORS = [errno.EFBIG, errno.ESTALE, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOSPC, errno.EDQUOT]


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("function", ["write", "open"])
@pytest.mark.parametrize("number", ERRORS)
def test_what_cannot_be_written_waits_whatever_the_error(
    number: int, function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = BufferedAppender(tmp_path / "rows")
    if function == "write":
        file.write(b"1")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, function, failing(number))
        file.write(b"2")
        assert file.error is not None and file.error.errno == number
        with pytest.raises(OSError):
            file.sync_to_disk()
    file.write(b"3")
    assert file.error is None
    file.close()
    assert (tmp_path / "rows").read_bytes() == (b"123" if function == "write" else b"23")


def test_half_a_row_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = BufferedAppender(tmp_path / "rows"), os.write
    with monkeypatch.context() as patch:
        answers = iter([lambda fd, data: write(fd, data[:2]), failing(errno.EFBIG)])
        patch.setattr(files.os, "write", lambda *args: next(answers)(*args))
        file.write(b"12345\n")
    file.write(b"6\n")
    assert (tmp_path / "rows").read_bytes() == b"12345\n6\n"


def test_what_a_failed_fsync_may_have_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = BufferedAppender(tmp_path / "rows")
    file.write(b"1\n")
    file.sync_to_disk()
    file.write(b"2\n")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", failing(errno.EIO))
        with pytest.raises(OSError):
            file.sync_to_disk()
    (tmp_path / "rows").write_bytes(b"1\n\0\0")  # lost by the system; the same file
    file.write(b"3\n")
    file.sync_to_disk()
    assert (tmp_path / "rows").read_bytes() == b"1\n2\n3\n"


def test_a_file_that_was_deleted_or_replaced_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = BufferedAppender(tmp_path / "rows")
    file.write(b"1\n")
    assert file.is_file_in_place()
    (tmp_path / "rows").rename(tmp_path / "moved")
    assert not file.is_file_in_place()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", failing(errno.ESTALE))
        file.write(b"2\n")
    file.flush()
    assert isinstance(file.error, FileNotFoundError)
    (tmp_path / "rows").write_bytes(b"other\n")
    file.flush()
    assert not file.is_file_in_place() and isinstance(file.error, FileNotFoundError)
    assert (tmp_path / "rows").read_bytes() == b"other\n"


def test_a_file_is_prepared_before_it_is_opened_until_that_succeeds(tmp_path: Path) -> None:
    tries = []

    def prepare() -> bytes:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ESTALE, "stale")
        return b"first\n"

    file = BufferedAppender(tmp_path / "rows", prepare)
    for text in (b"1\n", b"2\n", b"3\n", b"4\n"):
        file.write(text)
    assert (len(tries), (tmp_path / "rows").read_bytes()) == (3, b"first\n1\n2\n3\n4\n")


@pytest.mark.parametrize("write", [write_atomically, create_atomically])
@pytest.mark.parametrize("target", ["hvdtrain.system.files.os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_no_file(
    write: Callable[[Path, bytes], None], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(target, failing(errno.EIO))
        patch.setattr(Path, "hardlink_to", failing(errno.EACCES))
        with pytest.raises(OSError):
            write(tmp_path / "file", b"data")
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_the_new_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".file.new").symlink_to(tmp_path / "precious")
    write_atomically(tmp_path / "file", b"data")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "file").read_bytes() == b"data" and not (tmp_path / "file").is_symlink()


def row(step: int) -> bytes:
    return json.dumps({"step": step, "loss": 0.5}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "left", "cut"),
    [
        ([row(1), row(2)], [row(1), row(2)], RowCutResult(2, 2, 0, 0)),
        ([row(1), row(2), row(3), row(4)], [row(1), row(2)], RowCutResult(2, 2, 2, 0)),
        ([row(1), row(2)[:9]], [row(1)], RowCutResult(1, 1, 0, 1)),
        ([row(1), row(2)[:-1]], [row(1)], RowCutResult(1, 1, 0, 1)),
        ([row(1), b"\0\0\0\n", row(2), row(3)], [row(1), row(2)], RowCutResult(2, 2, 1, 1)),
        ([row(1), row(1), row(2)], [row(1), row(2)], RowCutResult(2, 2, 0, 1)),
        ([b'{"step": true}\n', b'{"step": "2"}\n', b"7\n", row(2)], [row(2)], RowCutResult(1, 2, 0, 3)),
        ([row(3), row(1), row(2)], [row(1), row(2)], RowCutResult(2, 2, 1, 0)),
        ([], [], RowCutResult(0, 0, 0, 0)),
    ],
)
def test_rows_up_to_the_checkpoint_are_kept(
    content: list[bytes], left: list[bytes], cut: RowCutResult, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(content))
    assert cut_rows(path, 2) == cut
    assert path.read_bytes() == b"".join(left)
    assert cut_rows(path, 2) == RowCutResult(cut.kept_rows, cut.last_step, 0, 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=500)
@given(content=st.binary(max_size=60), step=st.integers(0, 5))
def test_any_bytes_are_cut_to_rows_in_order(content: bytes, step: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(row(1) + content + row(2) + row(3))
    cut_rows(path, step)
    steps = [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
    assert steps == sorted(set(steps)) and all(1 <= number <= step for number in steps)


def write_segments(folder: Path, *segments: tuple[int, int]) -> None:
    """Segments of a ledger: after which step each begins, and the step of its last row."""
    for after, last in segments:
        rows = [LedgerRow(step, 1, 2 * step, 2, 3) for step in range(after + 1, last + 1)]
        ledger = Ledger(0, 1000, 2, after, rows)
        ledger.open_for_writing(folder)
        ledger.close()


@pytest.mark.parametrize(
    ("segments", "missing"),
    [
        ([], None),
        ([(0, 20)], None),
        ([(0, 30), (25, 27)], None),
        ([(0, 20), (20, 20)], None),
        ([(0, 10), (10, 30)], None),
        ([(0, 19)], "segment-000001.csv: its rows after step 19 are missing, up to step 20"),
        ([(0, 10), (10, 10)], "segment-000002.csv: its rows after step 10 are missing, up to step 20"),
        ([(0, 15), (20, 30)], "segment-000001.csv: its rows after step 15 are missing, up to step 20"),
    ],
)
def test_rows_that_the_ledger_lacks_before_a_checkpoint_are_announced(
    segments: list[tuple[int, int]], missing: str | None, tmp_path: Path
) -> None:
    write_segments(tmp_path, *segments)
    found = find_ledger_gap(tmp_path, 20)
    assert found is None if missing is None else found is not None and missing in found


def open_report(run_dir: Path, at: Position) -> Reporter:
    report = Reporter(ReportOptions(), METRICS)
    report.open_files(run_dir, 100, at, active=True)
    report.close()
    return report


@pytest.mark.parametrize(
    ("steps", "torn", "rows", "out", "err"),
    [
        ([1, 2], b"", 2, "", ""),
        ([1, 2, 3], b"", 2, "metrics   1 row after step 2 removed\n", ""),
        ([1, 2, 3, 4], b"{", 2, "metrics   2 rows after step 2 removed; 1 damaged line removed\n", ""),
        ([1], b'{"st', 2, "", "1 damaged line removed; 1 of 2 rows up to step 2 are there, the last of step 1\n"),
        ([], b"", 2, "", "0 of 2 rows up to step 2 are there, the last of step 0\n"),
        ([1], b"", None, "", ""),
    ],
)
def test_what_is_cut_or_missing_is_announced_in_one_line(
    steps: list[int], torn: bytes, rows: int | None, out: str, err: str, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(row, steps)) + torn)
    open_report(tmp_path, Position(step=2, rows=rows))
    said = capfd.readouterr()
    assert said.out == out
    assert said.err == (f"hvdtrain: warning: metrics.jsonl: {err}" if err else "")


def log_step(report: Reporter, at: Position) -> None:
    at.step += 1
    at.add_to_row([4.0], 8)
    report.record_step(at, StepReport(1, 0.1, 0.5, {}, StepTime(8, 0.01, 0.001)))
    report.write_due_row()
    report.report_write_errors(Ledger(0, 10, 2))


@pytest.mark.parametrize("number", ERRORS)
def test_errors_of_report_files_are_warned_of_once_and_nothing_is_lost(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    report, at = Reporter(ReportOptions(log_every=1), METRICS), Position()
    report.open_files(tmp_path, 100, at, active=True)
    log_step(report, at)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", failing(number))
        patch.setattr("hvdtrain.training.reporter.write_json", failing(number))
        report.record_advice({"chosen": "none"})
        for _ in range(3):
            log_step(report, at)
        with pytest.raises(OSError):
            report.sync_rows()
        assert report.write_summary({}) is not None
        assert report.rows.pending == 3
    log_step(report, at)
    assert report.write_summary({}) is None
    report.close()
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(f"hvdtrain: warning: cannot write metrics.jsonl in {tmp_path}: {os.strerror(number)}")
    assert lines[0].endswith("; rows wait in memory, training continues")
    assert len(lines) == 2 and lines[1].endswith("again: all pending rows were written")
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (written, at.rows) == ([1, 2, 3, 4, 5], 5)
    assert json.loads((tmp_path / "advisor.json").read_text()) == {"chosen": "none"}


def test_a_made_up_evaluation_counts_no_row_twice(tmp_path: Path) -> None:
    report, at = Reporter(ReportOptions(log_every=1, quiet=True), METRICS), Position()
    report.open_files(tmp_path, 100, at, active=True)
    for _ in range(2):
        log_step(report, at)
    at.eval = {"loss": 0.25}
    report.record_evaluation(at, 1)
    report.write_due_row()
    report.close()
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(one["step"], one.get("eval_loss")) for one in found] == [(1, None), (2, 0.25)]
    assert at.rows == 2


def test_progress_survives_the_way_to_another_rank() -> None:
    one = MetricsRow(3, 1, 24, 0.1, 100.0, 0.01, {"loss": 0.5}, {"loss": 0.25})
    worlds = [WorldHistory(1, 2, 3, {"rank 1 on a": 1})]
    ledger = LedgerState(seed=0, examples=8, batch=4, from_step=3, rows=[[4, 1, 12, 4, 99]])
    ledger = replace(ledger, lost=[[3, [[0, 2]]]], owed=[[4, [[0, 2]]]])
    progress = Progress(Position(step=3, eval={"loss": 0.25}), [one], ledger, worlds, "abc-dirty", [3, 2, [[4, 8]]])
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
