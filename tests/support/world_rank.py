"""One rank of a kept world: calls functions until the test run ends. Started by tests/support/worlds.py."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import random
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _pytest.assertion import install_importhook
from _pytest.config import get_config

import hvdtrain
from hvdtrain.exchange.bucketed import BucketedExchange
from tests.support.worlds import Reply, Request, receive, send

ROOT = Path(__file__).parents[2]
PACKAGES = Path(torch.__file__).parents[1]  # which need not be in this environment
KEPT_FOLDERS = (ROOT, PACKAGES, sys.prefix, sys.base_prefix)  # modules in these stay


def serve(address: str) -> None:
    """Connect to the test run, join the world, and answer requests."""
    # So that a failing assert on a rank shows its values; pytest does this to the test modules it imports.
    install_importhook(get_config())
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    # Before the first call, so that importing it is no part of that.
    world = hvdtrain.init()
    torch.set_num_threads(1)
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, requests), daemon=True).start()
    gc.collect()
    gc.freeze()  # what is there stays; collecting the rest after each call takes a tenth of the time
    send(connection, pickle.dumps(world.rank))
    while True:
        reply = answer(requests.get())
        try:
            data = pickle.dumps(reply)
        except Exception as error:
            text = f"the result cannot be pickled: {type(error).__name__}: {error}"
            data = pickle.dumps(Reply(None, RuntimeError(text), reply.trace or text, reply.printed))
        send(connection, data)


def listen(connection: socket.socket, requests: queue.SimpleQueue[Request]) -> None:
    """Hand requests over; end this process, whatever it is in, when the test run is gone."""
    while (request := receive_request(connection)) is not None:
        requests.put(request)
    os._exit(0)


def receive_request(connection: socket.socket) -> Request | None:
    """The next request; one that cannot be read is one that raises."""
    try:
        request: Request | None = receive(connection)
        return request
    except Exception as error:
        return Request(reraise, (error,), {}, None)


def reraise(error: BaseException) -> None:
    raise error


def answer(request: Request) -> Reply:
    """Call what was asked for, in a state that no earlier call has changed."""
    value, error, trace = None, None, ""
    with restored(), captured() as output:
        os.environ.update(request.env)
        if request.cwd:
            os.chdir(request.cwd)
        try:
            value = request.function(*request.args)
        except BaseException as problem:
            error, trace = portable(problem), traceback.format_exc()
            traceback.clear_frames(problem.__traceback__)
    return Reply(value, error, trace, output[0])


def portable(error: BaseException) -> BaseException:
    """The error, or one that quotes it where it cannot be pickled and read back."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 just written
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Take what is written to stdout and stderr, by C code too; the text is there at the end."""
    texts: list[str] = []
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield texts
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Seed the random generators for a call, treat warnings as errors in it, and undo what it did to this process."""
    environ, folder, path, modules = dict(os.environ), Path.cwd(), list(sys.path), set(sys.modules)
    dtype, cores = torch.get_default_dtype(), os.sched_getaffinity(0)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for module in ("torch", "tensorboard"):  # as in pyproject.toml
                warnings.filterwarnings("default", category=DeprecationWarning, module=module)
            yield
    finally:
        for exchange in list(BucketedExchange._open_exchanges):
            exchange.close()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if temporary(sys.modules[name]):
                del sys.modules[name]
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
        os.sched_setaffinity(0, cores)
        gc.collect()


def temporary(module: Any) -> bool:
    """Whether a module is a test's own file, which another test may have under the same name."""
    file = getattr(module, "__file__", None)
    return bool(file) and not any(Path(file).is_relative_to(folder) for folder in KEPT_FOLDERS)


if __name__ == "__main__":
    # By its real name, so that what it pickles is of the module that the test run knows.
    from tests.support import world_rank

    world_rank.serve(sys.argv[1])
