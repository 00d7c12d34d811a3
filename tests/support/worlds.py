"""Worlds of real ranks that stay alive through a test run, and run functions of test modules.

    pytest                     horovodrun --gloo -np 2
      world2.run(f, x)  ---->    rank 0: f(x)  \\  tests/support/world_rank.py,
                        ---->    rank 1: f(x)  /  Horovod initialized once
      [f(x), f(x)]      <----

A test that runs on ranks as a whole is decorated with `on_ranks(2, 3)`.

Starting a rank takes about 3 s of CPU time, and a call on ranks that are there some milliseconds. Requests and replies
are pickles over a Unix socket in a folder that only this user can enter.

After each call a rank restores its environment, folder, random state, threads, modules and torch's settings
(`world_rank.restored`). A world is ended, and the next call starts a new one, if a rank raised, died, or exceeded the
time limit: what is left of a collective that one rank began could spoil the next test.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pickle
import selectors
import shutil
import socket
import struct
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest

from hvdtrain.system.errors import KnownError
from tests.ranks.harness import Job, launcher
from tests.support.limits import stretch

T = TypeVar("T")
START_SECONDS = 100.0  # for all ranks to connect
GRACE_SECONDS = 40.0  # for the other ranks to end after one has raised
HEADER = struct.Struct("!Q")  # length of the pickle that follows


@dataclass(frozen=True)
class Request:
    """A function to call on a rank."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    env: Mapping[str, str]  # added to the environment during the call
    cwd: str | None


@dataclass(frozen=True)
class Reply:
    """What a rank's call came to."""

    value: Any
    error: BaseException | None  # what the function raised, if that can be pickled, or a RuntimeError that quotes it
    trace: str  # its traceback
    printed: str  # what the rank wrote to stdout and stderr during the call


class RanksFailed(AssertionError):
    """A function did not return on all ranks; the text holds every rank's traceback and output."""


class KeptWorld:
    """Ranks that are started by the first call and answer calls until `close`.

    Attributes:
        size: the number of ranks.
        printed: by rank, what the last call wrote to stdout and stderr.
    """

    def __init__(self, size: int, env: Mapping[str, str] | None = None, kind: str = "horovodrun") -> None:
        """size: the number of ranks. env: added to the environment that they are started in. kind: of `launcher`."""
        self.size = size
        self._kind = "alone" if size == 1 else kind
        # A machine that is busy for half a minute is not a rank that was lost.
        self._env = {"HOROVOD_GLOO_TIMEOUT_SECONDS": "120", **(env or {})}
        self.printed: list[str] = []
        self._stack: contextlib.ExitStack | None = None
        self._job: Job | None = None
        self._ranks: list[socket.socket] = []
        self._log = Path()

    def __enter__(self) -> KeptWorld:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        function: Callable[..., T],
        *args: Any,
        timeout: float = 90,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> list[T]:
        """Call a module-level function of a test module on every rank.

        Args:
            args: its arguments, picklable, the same on every rank.
            timeout: seconds until the world is ended and the test fails.
            env: environment variables to set during the call.
            cwd: the folder to call it in.

        Returns:
            Its results, by rank.

        Raises:
            RanksFailed: it raised on a rank, or a rank died or did not return in time.
        """
        replies = self._call(Request(function, args, env or {}, str(cwd) if cwd else None), timeout)
        if any(reply is None or reply.error for reply in replies):
            self._fail(function, replies, timeout)
        return [reply.value for reply in replies if reply]

    def errors(
        self,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 90,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> list[KnownError]:
        """Call a function as `run` does that must raise a KnownError on every rank, and return these.

        The world stays: all ranks raised, so no rank waits for another.

        Raises:
            RanksFailed: a rank returned, raised something else, died, or did not end in time.
        """
        replies = self._call(Request(function, args, env or {}, str(cwd) if cwd else None), timeout)
        found = [reply.error for reply in replies if reply and isinstance(reply.error, KnownError)]
        if len(found) < self.size:
            self._fail(function, replies, timeout)
        return found

    def close(self) -> None:
        """End the ranks; the next call starts new ones."""
        if self._stack:
            self._stack.close()
        self._stack, self._job, self._ranks = None, None, []

    def _call(self, request: Request, timeout: float) -> list[Reply | None]:
        """Every rank's reply; None for a rank that gave none in time."""
        try:
            if not self._ranks:
                self._start()
            data = pickle.dumps(request)
            replies: list[Reply | None] = [None] * self.size
            deadline = time.monotonic() + stretch(timeout)
            with selectors.DefaultSelector() as selector:
                for rank, connection in enumerate(self._ranks):
                    send(connection, data)
                    selector.register(connection, selectors.EVENT_READ, rank)
                while selector.get_map() and (left := deadline - time.monotonic()) > 0:
                    for key, _ in selector.select(left):
                        selector.unregister(key.fileobj)
                        answer = receive(self._ranks[key.data])
                        replies[key.data] = answer
                        if answer is None or answer.error:
                            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        except BaseException:  # the test's own time limit, say
            self.close()
            raise
        self.printed = [reply.printed if reply else "" for reply in replies]
        return replies

    def _start(self) -> None:
        with contextlib.ExitStack() as stack:
            folder = Path(tempfile.mkdtemp(prefix="world-"))  # mode 0700: what comes from in there may be unpickled
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(str(folder / "socket"))
            server.listen(self.size)
            server.settimeout(0.2)
            self._log = folder / "output"
            rank = [sys.executable, "-m", "tests.support.world_rank", str(folder / "socket")]
            self._job = stack.enter_context(Job([*launcher(self._kind, self.size), *rank], self._env, output=self._log))
            connections: dict[int, socket.socket] = {}
            deadline = time.monotonic() + START_SECONDS
            while len(connections) < self.size:
                if self._job.process.poll() is not None or time.monotonic() > deadline:
                    raise RanksFailed(f"a world of {self.size} did not start:\n{self._log.read_text()}")
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    stack.callback(connection.close)
                    connection.setblocking(True)
                    connections[receive(connection)] = connection
            self._ranks = [connections[rank] for rank in range(self.size)]
            self._stack = stack.pop_all()

    def _fail(self, function: Callable[..., Any], replies: list[Reply | None], timeout: float) -> None:
        """End the world and raise RanksFailed with all that is known."""
        texts = []
        silent = [rank for rank, reply in enumerate(replies) if reply is None]
        for rank, reply in enumerate(replies):
            if reply is None:
                limit = f"{stretch(timeout)} s or {GRACE_SECONDS} s of another rank's failure"
                what = f"died, or did not return within {limit}\n"
            else:
                what = reply.trace or f"returned {reply.value!r}\n"
            texts.append(f"--- rank {rank} of {self.size}: {what}{reply.printed if reply else ''}")
        if silent and self._job:
            texts += ["--- stacks", self._job.stacks(), "--- output", self._log.read_text()]
        self.close()
        raise RanksFailed(f"{function.__qualname__} failed\n" + "\n".join(texts))


class KeptWorlds:
    """Kept worlds by their number of ranks: `worlds[2]`."""

    existing: ClassVar[weakref.WeakSet[KeptWorlds]] = weakref.WeakSet()

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        """env: added to the environment that ranks are started in."""
        self._env = env
        self._worlds: dict[int, KeptWorld] = {}
        self.existing.add(self)

    def __getitem__(self, size: int) -> KeptWorld:
        return self._worlds.setdefault(size, KeptWorld(size, self._env))

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()


def close_kept_worlds() -> None:
    """End all kept worlds, which have much memory; the next call of one starts it again."""
    for worlds in KeptWorlds.existing:
        worlds.close()


def on_ranks(*sizes: int, timeout: float = 60) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a test that runs on every rank of kept worlds of these sizes, one report line for each size.

    All but the largest world are slow tests: little fails with fewer ranks only. Its parameters are those of a test,
    fixtures included, and must be picklable.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        module, name = function.__module__, function.__name__

        def test(worlds: KeptWorlds, ranks: int, **kwargs: Any) -> None:
            worlds[ranks].run(call_on_rank, module, name, kwargs, timeout=timeout)

        own = list(inspect.signature(function).parameters.values())
        given = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("worlds", "ranks")
            if name not in {parameter.name for parameter in own}
        ]
        test.__signature__ = inspect.Signature([*given, *own])  # type: ignore[attr-defined]
        test.__name__, test.__qualname__ = name, function.__qualname__
        test.__module__, test.__doc__ = module, function.__doc__
        test.on_rank = function  # type: ignore[attr-defined]
        test.pytestmark = list(getattr(function, "pytestmark", []))  # type: ignore[attr-defined]
        cases = [
            pytest.param(size, id=f"{size} rank{'s' * (size > 1)}", marks=[pytest.mark.slow] * (size < max(sizes)))
            for size in sizes
        ]
        return pytest.mark.parametrize("ranks", cases)(test)

    return decorate


def call_on_rank(module: str, name: str, kwargs: dict[str, Any]) -> None:
    """Call the function that `on_ranks` decorated."""
    getattr(importlib.import_module(module), name).on_rank(**kwargs)


def send(connection: socket.socket, data: bytes) -> None:
    """Send a pickle; of a peer that is gone, `receive` reports the end."""
    with contextlib.suppress(OSError):
        connection.sendall(HEADER.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """The next object from the peer, or None if it is gone."""
    with contextlib.suppress(OSError), connection.makefile("rb", buffering=0) as file:
        header = read_exactly(file, HEADER.size)
        if header and (data := read_exactly(file, HEADER.unpack(header)[0])):
            return pickle.loads(data)  # noqa: S301 from a folder that only this user can enter
    return None


def read_exactly(file: Any, count: int) -> bytes | None:
    parts = []
    while count:
        part = file.read(count)
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def train_here(recipe: str, run_dir: Path, options: tuple[str, ...]) -> dict[str, Any]:
    """What `hvdtrain train RECIPE --run-dir RUN_DIR OPTIONS` does on a rank, in this process."""
    import hvdtrain
    from hvdtrain.cli.train import load_arguments
    from hvdtrain.elastic.membership import FixedMembership
    from hvdtrain.training.fit import fit_from_command_line

    arguments = load_arguments([recipe, "--run-dir", str(run_dir), *options])
    from hvdtrain.cli import options as checked

    checked.check_parsed_arguments(arguments)
    return fit_from_command_line(
        arguments.recipe_class, arguments.name, arguments.given_options, hvdtrain.init(), FixedMembership()
    ).to_json()


def train(world: KeptWorld, recipe: str, run_dir: Path, *options: str, **kwargs: Any) -> dict[str, Any]:
    """Train on a kept world as `tests.ranks.harness.train` does on ranks of its own, and return rank 0's summary."""
    return world.run(train_here, recipe, run_dir, options, **kwargs)[0]


def refusal(world: KeptWorld, recipe: str, run_dir: Path, *options: str, **kwargs: Any) -> str:
    """Train on a kept world, which all ranks must refuse by a KnownError with the same text, and return that."""
    (text,) = {str(error) for error in world.errors(train_here, recipe, run_dir, options, **kwargs)}
    return text
