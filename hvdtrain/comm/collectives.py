"""Named collectives on torch tensors and on small objects. Tensors are matched over ranks by name."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError
from horovod.torch import mpi_ops
from numpy.typing import NDArray

from hvdtrain.system import activity
from hvdtrain.system.errors import KnownError, RecipeError, RunError, UserError

T = TypeVar("T")
Handle = int
Group: TypeAlias = "hvd.ProcessSet | None"  # the ranks that take part; None: all
_collective_names: dict[Handle, str] = {}  # of collectives that were started and not waited for
PeersLost = HorovodInternalError  # what collectives raise when another rank is gone, or has left


def rank(group: Group = None) -> int:
    """This process's place in the group, which it must be in."""
    return hvd.rank() if group is None else group.rank()  # type: ignore[no-any-return]


def size(group: Group = None) -> int:
    return hvd.size() if group is None else group.size()  # type: ignore[no-any-return]


def all_reduce_async_(tensor: torch.Tensor, name: str, average: bool = False, group: Group = None) -> Handle:
    """Start an in-place sum (or mean) over ranks of a contiguous tensor: fp16, fp32, fp64, int32 or int64."""
    op = hvd.Average if average else hvd.Sum
    return remember_name(
        hvd.allreduce_async_(tensor, name=name, op=op, process_set=group or hvd.global_process_set), name
    )


def all_to_all_async(tensor: torch.Tensor, name: str, group: Group = None) -> Handle:
    """Start sending part i of a 1-D tensor, in equal parts, to rank i; the parts received come in rank order."""
    return remember_name(hvd.alltoall_async(tensor, name=name, process_set=group or hvd.global_process_set), name)


def all_gather_async(tensor: torch.Tensor, name: str, group: Group = None) -> Handle:
    """Start bringing every rank's 1-D tensor to all ranks, one behind the other in rank order."""
    return remember_name(hvd.allgather_async(tensor, name=name, process_set=group or hvd.global_process_set), name)


def remember_name(handle: Handle, name: str) -> Handle:
    """Remember what a collective is called, for whoever is found waiting for it."""
    _collective_names[handle] = name
    return handle


def forget_names() -> None:
    """Forget collectives that nobody will wait for."""
    _collective_names.clear()


def broadcast_async_(tensor: torch.Tensor, name: str, root: int = 0, group: Group = None) -> Handle:
    """Start overwriting a contiguous tensor with that of the root, a rank among all."""
    return hvd.broadcast_async_(tensor, root, name=name, process_set=group or hvd.global_process_set)  # type: ignore[no-any-return]


class CallCounter(dict[Handle, Any]):
    """Horovod's table of collectives under way, which counts those that are started."""

    calls = 0

    def __setitem__(self, handle: Handle, tensors: Any) -> None:
        self.calls += 1
        super().__setitem__(handle, tensors)


@contextlib.contextmanager
def count_calls() -> Iterator[CallCounter]:
    """Count the collectives that this process starts, by whatever code, in the `calls` of what is yielded."""
    table = mpi_ops._handle_map
    counter = mpi_ops._handle_map = CallCounter(table)
    try:
        yield counter
    finally:
        table.clear()
        table.update(counter)
        mpi_ops._handle_map = table


def is_complete(handle: Handle) -> bool:
    """Whether `wait` would return at once."""
    return bool(mpi_ops.poll(handle))


def wait(handle: Handle) -> torch.Tensor:
    """Wait for a collective and return its tensor.

    Horovod's own wait spins and retakes the interpreter's lock each time round, which takes the core that its
    communication thread needs; so ask at intervals first. Not at shorter ones: MPI's threads spin and yield, and each
    yield to this one sets them back (Linux 6.18). At 0.2 ms three ranks on two cores stood still for a minute.
    """
    name = _collective_names.pop(handle, "")
    if not is_complete(handle):
        with activity.waiting_in_collective(name):
            pause = 20e-6
            while not is_complete(handle):
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)
    output = hvd.synchronize(handle)
    # An all-to-all also returns the sizes received.
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def broadcast_(tensor: torch.Tensor, name: str, root: int = 0, group: Group = None) -> None:
    """Overwrite a contiguous tensor with that of the root, a rank among all, also where only a group takes part."""
    if size(group) > 1:
        wait(
            remember_name(
                hvd.broadcast_async_(tensor, root, name=name, process_set=group or hvd.global_process_set), name
            )
        )


def broadcast_bytes(data: bytes | None, name: str, root: int = 0, group: Group = None) -> bytes:
    """The root's bytes, on every rank."""
    if size(group) == 1:
        assert data is not None
        return data
    length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64)
    broadcast_(length, f"{name}.length", root, group)
    if hvd.rank() == root:
        assert data is not None
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    else:
        tensor = torch.empty(int(length), dtype=torch.uint8)
    if len(tensor):
        broadcast_(tensor, f"{name}.bytes", root, group)
    return tensor.numpy().tobytes()


def broadcast_json(value: Any, name: str, root: int = 0) -> Any:
    """The root's value, on every rank, by way of JSON; the others' values are ignored."""
    data = json.dumps(value).encode() if hvd.rank() == root else None
    return json.loads(broadcast_bytes(data, name, root))


def gather_json(value: Any, name: str, group: Group = None) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank, by way of JSON."""
    if size(group) == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = wait(all_gather_async(torch.tensor([len(data)]), f"{name}.lengths", group)).tolist()
    joined = wait(all_gather_async(data, f"{name}.bytes", group)).numpy().tobytes()
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [json.loads(joined[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def gather_array(values: NDArray[Any], name: str, group: Group = None) -> NDArray[Any]:
    """(ranks, *shape): every rank's array, in the order of ranks, on every rank; shapes and types are the same."""
    if size(group) == 1:
        return values[None]
    data = torch.from_numpy(values.reshape(-1).copy())
    gathered: NDArray[Any] = wait(all_gather_async(data, name, group)).numpy()
    return gathered.reshape((size(group), *values.shape))


def on_root(name: str, function: Callable[[], T], root: int = 0) -> T:
    """Call `function` on the root only, and return its result, or raise its error, on every rank alike.

    Args:
        name: of the collective.
        function: returns a value that JSON can hold; every rank returns it as JSON gives it back.
        root: the rank that calls `function`.

    Raises:
        UserError, RunError, RecipeError: what the root's `function` raised, with its text, on all ranks.
        Any other error of `function` is raised on the root as it is, and as a RunError that names it on the others.
    """
    value, error = _call_and_catch(function) if hvd.rank() == root else (None, None)
    answer = broadcast_json([value, _encode_error(error)], name, root)
    if answer[1] is not None:
        raise _make_agreed_error(answer[1], root, error, named=False)
    return answer[0]  # type: ignore[no-any-return]


def on_all_ranks(name: str, function: Callable[[], T]) -> T:
    """Call `function` on every rank and return this rank's result; if it raises on any rank, raise on all of them.

    All ranks raise the error of the first rank that has one, which the text names with its host, unless `function`
    raised the same text on all ranks.

    Args:
        name: of the collective.
        function: what each rank does; it takes part in no collective that a failed rank would not reach.

    Raises:
        UserError, RunError, RecipeError: the first rank's.
        Any other error of `function` is raised as it is on that rank, and as a RunError that names it on the others.
    """
    value, error = _call_and_catch(function)
    failures = gather_json(_encode_error(error), name)
    failed = [rank for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        alike = all(failure is not None and failure[:2] == failures[0][:2] for failure in failures)
        raise _make_agreed_error(failures[failed[0]], failed[0], error, named=not alike)
    return value  # type: ignore[return-value]


def _call_and_catch(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Either the result or the error of a function; a lost peer ends this rank's part in the collective at once."""
    try:
        return function(), None
    except PeersLost:
        raise
    except Exception as error:
        return None, error


def _encode_error(error: Exception | None) -> tuple[str, str, str, str] | None:
    """An error as its class, its text, its recipe's traceback and the host it is from, to be sent to other ranks."""
    if error is None:
        return None
    trace = error.trace if isinstance(error, RecipeError) else ""
    known = next((kind for kind in (UserError, RunError, RecipeError) if isinstance(error, kind)), type(error))
    return known.__name__, str(error), trace, socket.gethostname()


def _make_agreed_error(failure: list[str], origin: int, own: Exception | None, *, named: bool) -> Exception:
    """What this rank raises for a failure on `origin`: the same on every rank if its class is a known one."""
    kind, text, trace, host = failure
    if kind not in ("UserError", "RunError", "RecipeError"):
        if own is not None and hvd.rank() == origin:
            return own
        text, named = f"{kind}: {text}", True
    text = f"rank {origin} on {host}: {text}" if named else text
    error: KnownError
    if kind == "RecipeError":
        error = RecipeError(text, trace)
    else:
        error = UserError(text) if kind == "UserError" else RunError(text)
    error.origin = origin
    error.__cause__ = own
    return error


def sum_float64(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """The sum over ranks of a small float64 array."""
    if hvd.size() == 1:
        return values
    return wait(all_reduce_async_(torch.from_numpy(values.copy()), name)).numpy()


def barrier(name: str) -> None:
    """Return when all ranks are here."""
    sum_float64(np.zeros(1), name)


def ring_all_reduce_bytes(payload: int, size: int) -> int:
    """Bytes that one rank sends in a ring all-reduce of `payload` bytes over `size` ranks."""
    return payload * 2 * (size - 1) // size
