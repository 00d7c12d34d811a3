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

NOTICE = 45.0  # seconds; HVDTRAIN_HANG_NOTICE overrides it
USUAL = 10.0  # median steps that a rank may take for one before it is worth a line
PATIENT = 3.0  # hang limits: see above
TICK = 1.0  # seconds
DEBUGGERS = ("pdb.py", "bdb.py", "pydevd.py", "debugpy")
COLLECTIVES = (("horovod", "torch"), ("torch", "distributed"))  # folders of what a recipe may call by itself
RECORD = struct.Struct("<qqd96s")  # beats, steps done, hang limit, activity: as `Record` shares them
RECORD_FD = "HVDTRAIN_RECORD"  # in the environment of a worker: the descriptor of its Record


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


class Record:
    """Memory that a worker shares with its supervisor, which can read it when the worker is dead."""

    def __init__(self, descriptor: int) -> None:
        os.ftruncate(descriptor, RECORD.size)
        self.memory = mmap.mmap(descriptor, RECORD.size)

    def write(self, beats: int, steps: int, limit: float, what: str) -> None:
        RECORD.pack_into(self.memory, 0, beats, steps, limit, what.encode()[:96])

    def read(self) -> tuple[int, int, float, str]:
        """The beats, the steps done, the hang limit in seconds, and the activity."""
        beats, steps, limit, what = RECORD.unpack_from(self.memory, 0)
        return beats, steps, limit, what.rstrip(b"\0").decode(errors="replace")


class _State:
    """This process's activity; written by the thread that trains, read by the watcher."""

    def __init__(self) -> None:
        self.current = Activity("starting", "", False, True, False)
        self.steps = 0  # done
        self.began = 0.0  # the step, by time.monotonic; 0: training has not begun
        self.seconds: deque[float] = deque(maxlen=64)  # of the last steps
        self.record: Record | None = None
        self.beats = 0
        self.limit = 0.0


_state = _State()


def enter(
    what: str, *, collective: str = "", waits: bool = False, patient: bool = False, endless: bool = False
) -> Activity:
    """Note what this rank does from now on; what it did before.

    what: it follows "has been". waits: for other ranks. patient: may take three hang limits. endless: has no limit.
    """
    before = _state.current
    _state.current = Activity(what, collective, waits, patient, endless)
    if _state.record is not None:
        _state.record.write(_state.beats, _state.steps, _state.limit, what)
    return before


@contextlib.contextmanager
def doing(what: str, *, waits: bool = False, patient: bool = False, endless: bool = False) -> Iterator[None]:
    """Note what this rank does in a block, and then what it did before."""
    before = enter(what, waits=waits, patient=patient, endless=endless)
    try:
        yield
    finally:
        _state.current = before


@contextlib.contextmanager
def waiting(collective: str) -> Iterator[None]:
    """Note that this rank waits for others in a collective, as a part of what it does."""
    before = _state.current
    _state.current = Activity(before.what, collective, True, before.patient, before.endless)
    try:
        yield
    finally:
        _state.current = before


def begin_steps(steps: int) -> None:
    """Note that training begins, or continues in another world, after `steps` steps of the run."""
    _state.began, _state.steps = time.monotonic(), steps
    enter("training")


def step_done(steps: int) -> None:
    """Note how many steps of the run are done."""
    now = time.monotonic()
    _state.seconds.append(now - _state.began)
    _state.began, _state.steps = now, steps
    enter("training")


class Watcher:
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
        self.notice, self.end, self.limit, self.blocked = notice, end, limit, False
        self.after = float(os.environ.get("HVDTRAIN_HANG_NOTICE", NOTICE))
        self._thread_id = threading.get_ident()
        self._stopped = threading.Event()
        self._armed = False  # faulthandler
        self._seen: Activity | None = None
        self._spent = 0.0  # in what was seen
        self._steps, self._without_step, self._due = -1, 0.0, self.after
        if (descriptor := os.environ.get(RECORD_FD)) is not None and _state.record is None:
            _state.record = Record(int(descriptor))
        _state.seconds.clear()
        _state.began = 0.0
        threading.Thread(target=self._run, name="hvdtrain-watcher", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        if self._armed:
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(min(TICK, self.after / 4)):
            now = time.monotonic()
            self.look(min(now - last, 2 * TICK))
            last = now

    def look(self, elapsed: float) -> None:
        """Act on what is the same as `elapsed` seconds ago."""
        current, steps = _state.current, _state.steps
        self._spent = self._spent + elapsed if current is self._seen else 0.0
        self._seen = current
        _state.beats, _state.limit = _state.beats + 1, self.limit
        if _state.record is not None:
            _state.record.write(_state.beats, steps, self.limit, current.what)
        usual = USUAL * statistics.median(_state.seconds) if _state.seconds else 0.0
        after = max(self.after, usual)
        if steps != self._steps:
            self._steps, self._without_step, self._due = steps, 0.0, 0.0
        self._without_step += elapsed
        if self._without_step >= max(after, self._due):
            self._due = 2 * self._without_step
            if (stands := self._standstill(current)) is not None:
                self.notice(stands, after)
        if _state.beats % 5 == 1:
            self._arm()
        if not self.limit or current.endless:
            return
        if self._spent >= max(self.limit, usual):
            stands = self._standstill(current)
            patient = current.patient or not _state.seconds or (stands is not None and stands.waits)
            if stands is not None and self._spent >= max(self.limit * (PATIENT if patient else 1.0), usual):
                self.end(stands)

    def _arm(self) -> None:
        """Let faulthandler, which needs no interpreter, end this process unless this is called again in time."""
        if self.limit and self.blocked:
            faulthandler.dump_traceback_later(PATIENT * self.limit + 60, exit=True)
        elif self._armed:
            faulthandler.cancel_dump_traceback_later()
        self._armed = bool(self.limit and self.blocked)

    def _standstill(self, activity: Activity) -> Standstill | None:
        """Describe an activity of the watched thread; None if it is in a debugger."""
        frame = sys._current_frames().get(self._thread_id)
        collective, waits, where = activity.collective, activity.waits, ""
        recipes = True  # whether the frames are of what the training calls, and not of what calls it
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            recipes = recipes and not any(path.is_relative_to(PACKAGE / room) for room in ("training", "cli"))
            if path.name in DEBUGGERS or any(name in path.parts for name in DEBUGGERS):
                return None
            if not collective and any(_contains(path, folders) for folders in COLLECTIVES):
                collective, waits = _collective_name(frame), True
            if recipes and not where and not (is_hidden(str(path)) or is_library(path)):
                where = f"{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"
            frame = frame.f_back
        step = _state.steps + 1 if _state.began else 0
        return Standstill(activity.what, collective, where, step, round(self._spent, 1), waits)


def is_library(path: Path) -> bool:
    """Whether a file is part of Python or of an installed package."""
    return path.is_relative_to(sysconfig.get_path("stdlib")) or "site-packages" in path.parts


def _contains(path: Path, folders: tuple[str, ...]) -> bool:
    parts = path.parts
    return any(parts[i : i + len(folders)] == folders for i in range(len(parts)))


def _collective_name(frame: FrameType | None) -> str:
    """The name of the collective that a frame of Horovod's is called for: of the outermost one that knows it."""
    found = ""
    while frame is not None and any(_contains(Path(frame.f_code.co_filename), folders) for folders in COLLECTIVES):
        name = frame.f_locals.get("name")
        found = name if isinstance(name, str) else frame.f_code.co_name
        frame = frame.f_back
    return found
