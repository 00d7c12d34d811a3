"""What this rank is in, and since when: so that a rank that hangs is named, and ended.

The training loop calls `enter` wherever a rank may get stuck; that stores a few words, which takes less than a
microsecond. A `Watcher`, a thread that wakes up once a second, notices how long they stay the same:

    same activity for    NOTICE seconds, or 10 median steps     the rank is named, once, and again at 2, 4, 8 times that
                         the hang limit                         this process ends with EXIT_FAILED
                         3 hang limits                          likewise, before the first step, in a checkpoint, or if
                                                                the rank only waits for others in a collective

Time in which the whole process is stopped (Ctrl-Z, a suspended machine) does not count, nor does time in a debugger.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import statistics
import struct
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hvdtrain.system.recipe_errors import PACKAGE, is_hidden

NOTICE_SECONDS = 45.0  # seconds; HVDTRAIN_HANG_NOTICE overrides it
SLOW_STEP_FACTOR = 10.0  # median steps that a rank may take for one before it is worth a line
PATIENT_FACTOR = 3.0  # hang limits: see above
WATCH_INTERVAL = 1.0  # seconds
DEBUGGER_FILES = ("pdb.py", "bdb.py", "pydevd.py", "debugpy")
COLLECTIVE_FOLDERS = (("horovod", "torch"), ("torch", "distributed"))  # folders of what a recipe may call by itself
ACTIVITY_STRUCT = struct.Struct("<qqd96s")  # beats, steps done, hang limit, activity: as `Record` shares them
ACTIVITY_FD_VARIABLE = "HVDTRAIN_RECORD"  # in the environment of a worker: the descriptor of its Record


class Activity:
    """What a rank is in. Each time it enters something there is a new object: so two batches can be distinguished."""

    __slots__ = ("collective", "endless", "patient", "waits", "what")

    def __init__(self, what: str, collective: str, waits: bool, patient: bool, endless: bool) -> None:
        self.what, self.collective, self.waits = what, collective, waits
        self.patient, self.endless = patient, endless


@dataclass(frozen=True)
class Standstill:
    """What a rank has been in, for how many seconds, at which step (from 1; 0: before training)."""

    what: str  # "loading its batch"
    collective: str  # its name, if the rank is in one
    where: str  # "mine.py:12 in score", if the recipe's own code runs
    step: int
    seconds: float
    waits: bool  # for others: they are the cause, unless they wait as well

    def __str__(self) -> str:
        notes = [f"step {self.step}"] if self.step else []
        notes += [f"collective {self.collective!r}"] if self.collective else []
        notes += [self.where] if self.where else []
        return f"{self.what} ({', '.join(notes)})" if notes else self.what


class ActivityRecord:
    """Memory that a worker shares with its supervisor, which can read it when the worker is dead."""

    def __init__(self, descriptor: int) -> None:
        os.ftruncate(descriptor, ACTIVITY_STRUCT.size)
        self.memory = mmap.mmap(descriptor, ACTIVITY_STRUCT.size)

    def write_activity(self, beats: int, steps: int, limit: float, what: str) -> None:
        ACTIVITY_STRUCT.pack_into(self.memory, 0, beats, steps, limit, what.encode()[:96])

    def read_activity(self) -> tuple[int, int, float, str]:
        """The beats, the steps done, the hang limit in seconds, and the activity."""
        beats, steps, limit, what = ACTIVITY_STRUCT.unpack_from(self.memory, 0)
        return beats, steps, limit, what.rstrip(b"\0").decode(errors="replace")


class _ProcessState:
    """This process's activity; written by the thread that trains, read by the watcher."""

    def __init__(self) -> None:
        self.current_activity = Activity("starting", "", False, True, False)
        self.steps_done = 0  # done
        self.step_began_at = 0.0  # the step, by time.monotonic; 0: training has not begun
        self.recent_step_seconds: deque[float] = deque(maxlen=64)  # of the last steps
        self.record: ActivityRecord | None = None
        self.beats = 0
        self.hang_limit = 0.0


_state = _ProcessState()


def enter_activity(
    what: str, *, collective: str = "", waits: bool = False, patient: bool = False, endless: bool = False
) -> Activity:
    """Note what this rank does from now on; what it did before.

    what: it follows "has been". waits: for other ranks. patient: may take three hang limits. endless: has no limit.
    """
    before = _state.current_activity
    _state.current_activity = Activity(what, collective, waits, patient, endless)
    if _state.record is not None:
        _state.record.write_activity(_state.beats, _state.steps_done, _state.hang_limit, what)
    return before


@contextlib.contextmanager
def temporary_activity(
    what: str, *, waits: bool = False, patient: bool = False, endless: bool = False
) -> Iterator[None]:
    """Note what this rank does in a block, and then what it did before."""
    before = enter_activity(what, waits=waits, patient=patient, endless=endless)
    try:
        yield
    finally:
        _state.current_activity = before


@contextlib.contextmanager
def waiting_in_collective(collective: str) -> Iterator[None]:
    """Note that this rank waits for others in a collective, as a part of what it does."""
    before = _state.current_activity
    _state.current_activity = Activity(before.what, collective, True, before.patient, before.endless)
    try:
        yield
    finally:
        _state.current_activity = before


def begin_training(steps: int) -> None:
    """Note that training begins, or continues in another world, after `steps` steps of the run."""
    _state.step_began_at, _state.steps_done = time.monotonic(), steps
    enter_activity("training")


def record_finished_steps(steps: int) -> None:
    """Note how many steps of the run are done."""
    now = time.monotonic()
    _state.recent_step_seconds.append(now - _state.step_began_at)
    _state.step_began_at, _state.steps_done = now, steps
    enter_activity("training")


class HangWatcher:
    """Watches the activity of the thread that makes it.

    notice: called with a Standstill that is worth a line, in the watcher's thread. end: called with one that is to end
    this process. limit: the hang limit in seconds; 0: none.

    blocked: set for a rank among several, also end this process if its interpreter runs no thread for three hang
    limits (faulthandler prints where it is). Not for one that is alone, which its user may stop and continue.
    """

    def __init__(
        self,
        notice: Callable[[Standstill, float], None],
        end: Callable[[Standstill], None],
        limit: float,
    ) -> None:
        self.on_standstill, self.on_hang, self.hang_limit, self.ends_if_blocked = notice, end, limit, False
        self.notice_after = float(os.environ.get("HVDTRAIN_HANG_NOTICE", NOTICE_SECONDS))
        self._thread_id = threading.get_ident()
        self._stopped = threading.Event()
        self._is_faulthandler_armed = False  # faulthandler
        self._seen_activity: Activity | None = None
        self._seconds_in_activity = 0.0  # in what was seen
        self._seen_steps, self._seconds_without_step, self._next_notice_after = -1, 0.0, self.notice_after
        if (descriptor := os.environ.get(ACTIVITY_FD_VARIABLE)) is not None and _state.record is None:
            _state.record = ActivityRecord(int(descriptor))
        _state.recent_step_seconds.clear()
        _state.step_began_at = 0.0
        threading.Thread(target=self._watch_activity, name="hvdtrain-watcher", daemon=True).start()

    def stop_watching(self) -> None:
        self._stopped.set()
        if self._is_faulthandler_armed:
            faulthandler.cancel_dump_traceback_later()

    def _watch_activity(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(min(WATCH_INTERVAL, self.notice_after / 4)):
            now = time.monotonic()
            self.check_activity(min(now - last, 2 * WATCH_INTERVAL))
            last = now

    def check_activity(self, elapsed: float) -> None:
        """Act on what is the same as `elapsed` seconds ago."""
        current, steps = _state.current_activity, _state.steps_done
        self._seconds_in_activity = self._seconds_in_activity + elapsed if current is self._seen_activity else 0.0
        self._seen_activity = current
        _state.beats, _state.hang_limit = _state.beats + 1, self.hang_limit
        if _state.record is not None:
            _state.record.write_activity(_state.beats, steps, self.hang_limit, current.what)
        usual = SLOW_STEP_FACTOR * statistics.median(_state.recent_step_seconds) if _state.recent_step_seconds else 0.0
        after = max(self.notice_after, usual)
        if steps != self._seen_steps:
            self._seen_steps, self._seconds_without_step, self._next_notice_after = steps, 0.0, 0.0
        self._seconds_without_step += elapsed
        if self._seconds_without_step >= max(after, self._next_notice_after):
            self._next_notice_after = 2 * self._seconds_without_step
            if (stands := self._describe_standstill(current)) is not None:
                self.on_standstill(stands, after)
        if _state.beats % 5 == 1:
            self._arm_faulthandler()
        if not self.hang_limit or current.endless:
            return
        if self._seconds_in_activity >= max(self.hang_limit, usual):
            stands = self._describe_standstill(current)
            patient = current.patient or not _state.recent_step_seconds or (stands is not None and stands.waits)
            if stands is not None and self._seconds_in_activity >= max(
                self.hang_limit * (PATIENT_FACTOR if patient else 1.0), usual
            ):
                self.on_hang(stands)

    def _arm_faulthandler(self) -> None:
        """Let faulthandler, which needs no interpreter, end this process unless this is called again in time."""
        if self.hang_limit and self.ends_if_blocked:
            faulthandler.dump_traceback_later(PATIENT_FACTOR * self.hang_limit + 60, exit=True)
        elif self._is_faulthandler_armed:
            faulthandler.cancel_dump_traceback_later()
        self._is_faulthandler_armed = bool(self.hang_limit and self.ends_if_blocked)

    def _describe_standstill(self, activity: Activity) -> Standstill | None:
        """Describe an activity of the watched thread; None if it is in a debugger."""
        frame = sys._current_frames().get(self._thread_id)
        collective, waits, where = activity.collective, activity.waits, ""
        recipes = True  # whether the frames are of what the training calls, and not of what calls it
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            recipes = recipes and not any(path.is_relative_to(PACKAGE / room) for room in ("training", "cli"))
            if path.name in DEBUGGER_FILES or any(name in path.parts for name in DEBUGGER_FILES):
                return None
            if not collective and any(_contains_folders(path, folders) for folders in COLLECTIVE_FOLDERS):
                collective, waits = _find_collective_name(frame), True
            if recipes and not where and not (is_hidden(str(path)) or is_library_file(path)):
                where = f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
            frame = frame.f_back
        step = _state.steps_done + 1 if _state.step_began_at else 0
        return Standstill(activity.what, collective, where, step, round(self._seconds_in_activity, 1), waits)


def is_library_file(path: Path) -> bool:
    """Whether a file is part of Python or of an installed package."""
    return path.is_relative_to(sysconfig.get_path("stdlib")) or "site-packages" in path.parts


def _contains_folders(path: Path, folders: tuple[str, ...]) -> bool:
    parts = path.parts
    return any(parts[i : i + len(folders)] == folders for i in range(len(parts)))


def _find_collective_name(frame: FrameType | None) -> str:
    """The name of the collective that a frame of Horovod's is called for: of the outermost one that knows it."""
    found = ""
    while frame is not None and any(
        _contains_folders(Path(frame.f_code.co_filename), folders) for folders in COLLECTIVE_FOLDERS
    ):
        name = frame.f_locals.get("name")
        found = name if isinstance(name, str) else frame.f_code.co_name
        frame = frame.f_back
    return found
