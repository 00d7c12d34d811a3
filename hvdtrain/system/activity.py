"""Record what this rank is doing, and since when, so that a rank that hangs is named and ended.

The training loop calls `enter_activity` wherever a rank may get stuck; it stores a few words, which takes less than a
microsecond. A `HangWatcher`, a thread that wakes up once a second, measures how long they stay the same:

    same activity for    HangLimits.notice, or 10 median steps  the rank is named, and again at 2, 4, 8 times that
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

from hvdtrain.system.limits import HangLimits
from hvdtrain.system.recipe_errors import PACKAGE, is_hidden

SLOW_STEP_FACTOR = 10.0  # a step that takes this many times the median is worth a line
PATIENT_FACTOR = 3.0  # hang limits, for activities that may take long: see above
DEBUGGER_FILES = ("pdb.py", "bdb.py", "pydevd.py", "debugpy")
COLLECTIVE_FOLDERS = (("horovod", "torch"), ("torch", "distributed"))  # of collectives that a recipe may call itself
ACTIVITY_STRUCT = struct.Struct("<qqd96s")  # beats, steps done, hang limit, activity: as ActivityRecord shares them
ACTIVITY_FD_VARIABLE = "HVDTRAIN_RECORD"  # environment variable of a worker: the descriptor of its ActivityRecord


class Activity:
    """What a rank is doing. Each `enter_activity` makes a new object, so that two batches can be told apart.

    Attributes:
        what: in words that follow "has been".
        collective: the name of the collective that it waits in, or "".
        waits: whether it waits for other ranks.
        patient: whether it may take three hang limits.
        endless: whether it has no limit.
    """

    __slots__ = ("collective", "endless", "patient", "waits", "what")

    def __init__(self, what: str, collective: str, waits: bool, patient: bool, endless: bool) -> None:
        self.what, self.collective, self.waits = what, collective, waits
        self.patient, self.endless = patient, endless


@dataclass(frozen=True)
class Standstill:
    """An activity that has lasted long.

    Attributes:
        what: the activity: "loading its batch".
        collective: the name of the collective that the rank waits in, or "".
        where: the recipe's own code, if it runs: "mine.py:12 in score".
        step: the number of the step, from 1; 0 before training.
        seconds: how long it has lasted.
        waits: whether the rank waits for others, which are the cause unless they wait as well.
    """

    what: str
    collective: str
    where: str
    step: int
    seconds: float
    waits: bool

    def __str__(self) -> str:
        notes = [f"step {self.step}"] if self.step else []
        notes += [f"collective {self.collective!r}"] if self.collective else []
        notes += [self.where] if self.where else []
        return f"{self.what} ({', '.join(notes)})" if notes else self.what


class ActivityRecord:
    """Memory that a worker shares with its supervisor, which can read it even after the worker has died."""

    def __init__(self, descriptor: int) -> None:
        os.ftruncate(descriptor, ACTIVITY_STRUCT.size)
        self.memory = mmap.mmap(descriptor, ACTIVITY_STRUCT.size)

    def write_activity(self, beats: int, steps: int, limit: float, what: str) -> None:
        """Store what `read_activity` returns."""
        ACTIVITY_STRUCT.pack_into(self.memory, 0, beats, steps, limit, what.encode()[:96])

    def read_activity(self) -> tuple[int, int, float, str]:
        """Return the watcher's count of looks, the steps done, the hang limit in seconds, and the activity."""
        beats, steps, limit, what = ACTIVITY_STRUCT.unpack_from(self.memory, 0)
        return beats, steps, limit, what.rstrip(b"\0").decode(errors="replace")


class _ProcessState:
    """This process's activity; written by the thread that trains, read by the watcher."""

    def __init__(self) -> None:
        self.current_activity = Activity("starting", "", False, True, False)
        self.steps_done = 0
        self.step_began_at = 0.0  # monotonic time; 0: training has not begun
        self.recent_step_seconds: deque[float] = deque(maxlen=64)
        self.record: ActivityRecord | None = None
        self.beats = 0
        self.hang_limit = 0.0


_state = _ProcessState()


def enter_activity(
    what: str, *, collective: str = "", waits: bool = False, patient: bool = False, endless: bool = False
) -> Activity:
    """Record what this rank does from now on, and return what it did before; the arguments are those of Activity."""
    before = _state.current_activity
    _state.current_activity = Activity(what, collective, waits, patient, endless)
    if _state.record is not None:
        _state.record.write_activity(_state.beats, _state.steps_done, _state.hang_limit, what)
    return before


@contextlib.contextmanager
def temporary_activity(
    what: str, *, waits: bool = False, patient: bool = False, endless: bool = False
) -> Iterator[None]:
    """Record what this rank does in a block, and after it what it did before."""
    before = enter_activity(what, waits=waits, patient=patient, endless=endless)
    try:
        yield
    finally:
        _state.current_activity = before


@contextlib.contextmanager
def waiting_in_collective(collective: str) -> Iterator[None]:
    """Record that this rank waits for others in a collective, as a part of what it does."""
    before = _state.current_activity
    _state.current_activity = Activity(before.what, collective, True, before.patient, before.endless)
    try:
        yield
    finally:
        _state.current_activity = before


def begin_training(steps: int) -> None:
    """Record that training begins, or continues in another world, after `steps` steps of the run."""
    _state.step_began_at, _state.steps_done = time.monotonic(), steps
    enter_activity("training")


def record_finished_steps(steps: int) -> None:
    """Record how many steps of the run are done."""
    now = time.monotonic()
    _state.recent_step_seconds.append(now - _state.step_began_at)
    _state.step_began_at, _state.steps_done = now, steps
    enter_activity("training")


class HangWatcher:
    """Watches the activity of the thread that makes it, from a thread of its own.

    Attributes:
        hang_limit: seconds; 0 for none.
        ends_if_blocked: whether this process also ends if its interpreter runs no thread for three hang limits
            (faulthandler prints where it is). To be set for a rank among several; a rank that is alone may be stopped
            and continued by its user.
    """

    def __init__(
        self,
        on_standstill: Callable[[Standstill, float], None],
        on_hang: Callable[[Standstill], None],
        hang_limit: float,
    ) -> None:
        """Begin to watch.

        Args:
            on_standstill: called, in the watcher's thread, with an activity that is worth a line, and the seconds from
                which on it is.
            on_hang: called with one that is to end this process.
            hang_limit: seconds; 0 for none.
        """
        self.on_standstill, self.on_hang = on_standstill, on_hang
        self.hang_limit, self.ends_if_blocked = hang_limit, False
        self.limits = HangLimits.from_environment()
        self._thread_id = threading.get_ident()
        self._stopped = threading.Event()
        self._is_faulthandler_armed = False
        self._seen_activity: Activity | None = None
        self._seconds_in_activity = 0.0
        self._seen_steps, self._seconds_without_step, self._next_notice_after = -1, 0.0, self.limits.notice
        if (descriptor := os.environ.get(ACTIVITY_FD_VARIABLE)) is not None and _state.record is None:
            _state.record = ActivityRecord(int(descriptor))
        _state.recent_step_seconds.clear()
        _state.step_began_at = 0.0
        threading.Thread(target=self._watch_activity, name="hvdtrain-watcher", daemon=True).start()

    def stop_watching(self) -> None:
        """Stop the thread."""
        self._stopped.set()
        if self._is_faulthandler_armed:
            faulthandler.cancel_dump_traceback_later()

    def _watch_activity(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(min(self.limits.watch, self.limits.notice / 4)):
            now = time.monotonic()
            self.check_activity(min(now - last, 2 * self.limits.watch))
            last = now

    def check_activity(self, elapsed: float) -> None:
        """Compare the activity with that of the last look, `elapsed` seconds ago, and act if it has lasted too long."""
        current, steps = _state.current_activity, _state.steps_done
        self._seconds_in_activity = self._seconds_in_activity + elapsed if current is self._seen_activity else 0.0
        self._seen_activity = current
        _state.beats, _state.hang_limit = _state.beats + 1, self.hang_limit
        if _state.record is not None:
            _state.record.write_activity(_state.beats, steps, self.hang_limit, current.what)
        usual = SLOW_STEP_FACTOR * statistics.median(_state.recent_step_seconds) if _state.recent_step_seconds else 0.0
        after = max(self.limits.notice, usual)
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
        """Have faulthandler, which needs no interpreter, end this process unless this is called again in time."""
        if self.hang_limit and self.ends_if_blocked:
            faulthandler.dump_traceback_later(PATIENT_FACTOR * self.hang_limit + self.limits.blocked, exit=True)
        elif self._is_faulthandler_armed:
            faulthandler.cancel_dump_traceback_later()
        self._is_faulthandler_armed = bool(self.hang_limit and self.ends_if_blocked)

    def _describe_standstill(self, activity: Activity) -> Standstill | None:
        """Describe an activity of the watched thread; None if it is in a debugger."""
        frame = sys._current_frames().get(self._thread_id)
        collective, waits, where = activity.collective, activity.waits, ""
        recipes = True  # whether the frames belong to what the training calls, not to what calls it
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
    """Return whether a file is part of Python or of an installed package."""
    return path.is_relative_to(sysconfig.get_path("stdlib")) or "site-packages" in path.parts


def _contains_folders(path: Path, folders: tuple[str, ...]) -> bool:
    parts = path.parts
    return any(parts[i : i + len(folders)] == folders for i in range(len(parts)))


def _find_collective_name(frame: FrameType | None) -> str:
    """Return the name of the collective that a frame of Horovod's works for, which the outermost frame knows best."""
    found = ""
    while frame is not None and any(
        _contains_folders(Path(frame.f_code.co_filename), folders) for folders in COLLECTIVE_FOLDERS
    ):
        name = frame.f_locals.get("name")
        found = name if isinstance(name, str) else frame.f_code.co_name
        frame = frame.f_back
    return found
