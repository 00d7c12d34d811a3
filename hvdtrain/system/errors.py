"""Errors that end a command, with their exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FAILED = 1  # a rank failed
EXIT_USER_ERROR = 2  # the user's mistake, found before any rank starts
EXIT_NOT_EXECUTABLE = 126  # of a command that cannot be executed, as of a shell
EXIT_NOT_FOUND = 127  # of a command that does not exist, as of a shell
EXIT_RESTART = 76  # of a worker of an elastic run that its supervisor is to start again: another one has failed it
EXIT_REQUEUE = 75  # the state is saved; run again with --resume (EX_TEMPFAIL of sysexits.h)


class KnownError(Exception):
    """A failure whose text is all that a user needs to read.

    Attributes:
        exit_code: that of a process that ends with it.
        origin: the rank on which it happened, if all ranks raise it together
            (`hvdtrain.comm.collectives.on_all_ranks`). The text then names that rank where it matters.
        trace: a traceback to print before the text; "" for none.
    """

    exit_code: int = EXIT_FAILED
    origin: int | None = None
    trace: str = ""


class RequeueExit(SystemExit):
    """Raised when a batch system's signal ends this process; to be told apart from a recipe that exits."""


class UserError(KnownError):
    """A user's mistake: shown as one line on standard error, exit 2, no traceback."""

    exit_code = EXIT_USER_ERROR


class CommandError(KnownError):
    """A command that cannot be started: shown as one line, with the exit code that a shell would give it."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class RunError(KnownError):
    """A run that failed for a reason that needs no traceback: shown as it is, exit 1."""


class RecipeError(KnownError):
    """An error in a recipe's own code: shown as one line that names the method, and the recipe's traceback, exit 1.

    Attributes:
        text: the line.
        trace: the traceback as Python prints it, without the frames of hvdtrain and torch; "" if it has no others.
    """

    def __init__(self, text: str, trace: str = "") -> None:
        super().__init__(text, trace)  # both, to be pickled by a loader's worker
        self.text, self.trace = text, trace

    def __str__(self) -> str:
        return self.text


def suggest_nearest(value: str, valid: Iterable[str], *, list_all: bool = True) -> str:
    """Return the end of an error message: the valid name that is near, or else all of them.

    Args:
        value: what was given.
        valid: the names that are accepted.
        list_all: list the valid names if none of them is near.
    """
    names = sorted(valid)
    bare = {name.lstrip("-").lower(): name for name in reversed(names)}  # dashes make all options look alike
    close = difflib.get_close_matches(value.lstrip("-").lower(), bare, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {bare[close[0]]!r}?"
    return f"; there are: {', '.join(names)}" if names and list_all else ""
