"""Named collectives on torch tensors and on small objects, over Horovod or a process group of torch.distributed.

The group says which of the two: over Horovod the name matches the tensors of all ranks, over a `TorchGroup` the order
in which a rank starts its collectives. Horovod is imported when it is first used, so that those who have none can use
the latter. No group is all ranks: of Horovod's world, or in a grid, where those are a column of it only
(hvdtrain.comm.grid), of a `TorchGroup`.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from hvdtrain.comm.lazy_horovod import Column, LazyHorovod, load_peers_lost
from hvdtrain.comm.torch_group import TorchCollective, TorchGroup
from hvdtrain.system import activity
from hvdtrain.system.errors import KnownError, RecipeError, RunError, UserError

if TYPE_CHECKING:
    import horovod.torch as hvd

    PeersLost: type[Exception]  # raised by Horovod's collectives when another rank has died or left
else:
    hvd = LazyHorovod()

    def __getattr__(name: str) -> Any:
        if name == "PeersLost":
            return load_peers_lost()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


T = TypeVar("T")
Handle: TypeAlias = "int | TorchCollective"
Group: TypeAlias = "hvd.ProcessSet | TorchGroup | Column | None"  # the ranks that take part; None: all
COLUMN = Column()  # Horovod's ranks, also in a grid
_everyone: TorchGroup | None = None  # all ranks, in a grid
_collective_names: dict[Handle, str] = {}  # of Horovod's collectives that were started and not yet waited for


def set_everyone(group: TorchGroup | None) -> None:
    """From now on let no group be all ranks of this one; None: of Horovod's world."""
    global _everyone
    if _everyone is not None:
        _everyone.close()
    _everyone = group


def find_torch_group(group: Group) -> TorchGroup | None:
    """Return the torch group of a collective; None: Horovod carries it."""
    group = _everyone if group is None else group
    return group if isinstance(group, TorchGroup) else None


def find_process_set(group: Group) -> Any:
    """Return Horovod's process set of a collective that Horovod carries."""
    return hvd.global_process_set if group is None or group is COLUMN else group


def rank(group: Group = None) -> int:
    """Return this process's rank in a group that it belongs to."""
    return (find_torch_group(group) or group or COLUMN).rank()


def size(group: Group = None) -> int:
    """Return the number of ranks in a group."""
    return (find_torch_group(group) or group or COLUMN).size()


def second_round_group(group: Group) -> Group:
    """Return the group of collectives whose order among the others' may differ between ranks."""
    torch_group = find_torch_group(group)
    return group if torch_group is None else torch_group.second


def is_initialized() -> bool:
    """Return whether this process is a rank of a world."""
    return bool(hvd.is_initialized())


def all_reduce_async_(tensor: torch.Tensor, name: str, average: bool = False, group: Group = None) -> Handle:
    """Start an in-place sum (or mean) over ranks of a contiguous tensor: fp16, fp32, fp64, int32 or int64."""
    if (torch_group := find_torch_group(group)) is not None:
        return torch_group.start_all_reduce(tensor, average)
    op = hvd.Average if average else hvd.Sum
    return remember_name(hvd.allreduce_async_(tensor, name=name, op=op, process_set=find_process_set(group)), name)


def all_to_all_async(tensor: torch.Tensor, name: str, group: Group = None) -> Handle:
    """Start sending part i of a 1-D tensor, cut into equal parts, to rank i; `wait` returns the parts in rank order."""
    if (torch_group := find_torch_group(group)) is not None:
        return torch_group.start_all_to_all(tensor)
    return remember_name(hvd.alltoall_async(tensor, name=name, process_set=find_process_set(group)), name)


def all_gather_async(tensor: torch.Tensor, name: str, group: Group = None) -> Handle:
    """Start gathering every rank's tensor on all ranks, joined along the first dimension in rank order.

    The first dimension may differ between ranks, and be 0 on some, unless the group is a TorchGroup; the others may
    not.
    """
    if (torch_group := find_torch_group(group)) is not None:
        return torch_group.start_all_gather(tensor)
    return remember_name(hvd.allgather_async(tensor, name=name, process_set=find_process_set(group)), name)


def remember_name(handle: Handle, name: str) -> Handle:
    """Remember the name of a collective, to report it if a rank hangs in it."""
    _collective_names[handle] = name
    return handle


def forget_names() -> None:
    """Forget the names of collectives that will not be waited for."""
    _collective_names.clear()


def broadcast_async_(tensor: torch.Tensor, name: str, root: int = 0, group: Group = None) -> Handle:
    """Start overwriting a contiguous tensor with the root's; the root is a rank of the world, not of a process set."""
    if (torch_group := find_torch_group(group)) is not None:
        return torch_group.start_broadcast(tensor, root)
    return remember_name(hvd.broadcast_async_(tensor, root, name=name, process_set=find_process_set(group)), name)


def is_complete(handle: Handle) -> bool:
    """Return whether `wait` would return at once."""
    if isinstance(handle, TorchCollective):
        return handle.is_complete()
    return bool(hvd.poll(handle))


def wait(handle: Handle) -> torch.Tensor:
    """Wait for a collective and return its tensor.

    Horovod's own wait spins and takes the interpreter's lock in each iteration, which occupies the core that its
    communication thread needs. So this polls first, at intervals from 20 us to 1 ms. They must not stay short: MPI's
    threads spin and yield, and each yield to this thread delays them (Linux 6.18). With intervals of 0.2 ms, three
    ranks on two cores made no progress for a minute.
    """
    if isinstance(handle, TorchCollective) and not handle.beside_horovod:
        return handle.wait()
    name = _collective_names.pop(handle, "")
    if not is_complete(handle):
        with activity.waiting_in_collective(name):
            pause = 20e-6
            while not is_complete(handle):
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)
    if isinstance(handle, TorchCollective):
        return handle.wait()
    output = hvd.synchronize(handle)
    # An all-to-all also returns the sizes received.
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def broadcast_(tensor: torch.Tensor, name: str, root: int = 0, group: Group = None) -> None:
    """Overwrite a contiguous tensor with the root's; the root is a rank of the world, not of a process set."""
    if size(group) > 1:
        wait(broadcast_async_(tensor, name, root, group))


def broadcast_bytes(data: bytes | None, name: str, root: int = 0, group: Group = None) -> bytes:
    """Return the root's bytes on every rank; the root is a rank of the world, not of a process set."""
    if size(group) == 1:
        assert data is not None
        return data
    length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64)
    broadcast_(length, f"{name}.length", root, group)
    if rank(COLUMN if group is COLUMN else None) == root:
        assert data is not None
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    else:
        tensor = torch.empty(int(length), dtype=torch.uint8)
    if len(tensor):
        broadcast_(tensor, f"{name}.bytes", root, group)
    return tensor.numpy().tobytes()


def broadcast_json(value: Any, name: str, root: int = 0) -> Any:
    """Return the root's value, encoded as JSON, on every rank; the others' values are ignored."""
    data = json.dumps(value).encode() if rank() == root else None
    return json.loads(broadcast_bytes(data, name, root))


def gather_json(value: Any, name: str, group: Group = None) -> list[Any]:
    """Return every rank's value, encoded as JSON, in the order of ranks, on every rank."""
    if size(group) == 1:
        return [value]
    if (torch_group := find_torch_group(group)) is not None:
        return [json.loads(text) for text in torch_group.gather_texts(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = wait(all_gather_async(torch.tensor([len(data)]), f"{name}.lengths", group)).tolist()
    joined = wait(all_gather_async(data, f"{name}.bytes", group)).numpy().tobytes()
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [json.loads(joined[end - length : end]) for end, length in zip(ends, lengths, strict=True)]


def gather_array(values: NDArray[Any], name: str, group: Group = None) -> NDArray[Any]:
    """Return (ranks, *shape) every rank's array, in the order of ranks; shapes and types must be equal on all."""
    if size(group) == 1:
        return values[None]
    data = torch.from_numpy(values.reshape(-1).copy())
    gathered: NDArray[Any] = wait(all_gather_async(data, name, group)).numpy()
    return gathered.reshape((size(group), *values.shape))


def gather_rows(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Return every rank's rows, (n, *shape) of any n, one after the other in the order of ranks, on every rank."""
    if size() == 1:
        return values
    rows = torch.from_numpy(np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8).copy())
    if (torch_group := find_torch_group(None)) is not None:
        joined = torch.cat(torch_group.gather_uneven(rows)).numpy()
    else:
        joined = wait(all_gather_async(rows, name)).numpy()
    return joined.view(values.dtype).reshape(-1, *values.shape[1:])


def on_root(name: str, function: Callable[[], T], root: int = 0) -> T:
    """Call `function` on the root only, and return its result, or raise its error, on every rank alike.

    Args:
        name: of the collective.
        function: returns a value that JSON can hold; every rank returns it as it comes out of JSON.
        root: the rank that calls `function`.

    Raises:
        UserError, RunError, RecipeError: what the root's `function` raised, with its text, on all ranks.
        Any other error of `function` is raised on the root as it is, and as a RunError that names it on the others.
    """
    value, error = _call_and_catch(function) if rank() == root else (None, None)
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
        function: what each rank does; it must not call a collective that a rank which fails would not reach.

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
    """Return either the result or the error of a function; a lost peer is raised at once."""
    try:
        return function(), None
    except Exception as error:
        if isinstance(error, load_peers_lost()):
            raise
        return None, error


def _encode_error(error: Exception | None) -> tuple[str, str, str, str] | None:
    """Return an error's class, text, recipe's traceback and host, to be sent to other ranks."""
    if error is None:
        return None
    trace = error.trace if isinstance(error, RecipeError) else ""
    known = next((kind for kind in (UserError, RunError, RecipeError) if isinstance(error, kind)), type(error))
    return known.__name__, str(error), trace, socket.gethostname()


def _make_agreed_error(failure: list[str], origin: int, own: Exception | None, *, named: bool) -> Exception:
    """Return what this rank raises for a failure on rank `origin`: the same on every rank if its class is known."""
    kind, text, trace, host = failure
    if kind not in ("UserError", "RunError", "RecipeError"):
        if own is not None and rank() == origin:
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
    """Return the sum over ranks of a small float64 array."""
    if size() == 1:
        return values
    return wait(all_reduce_async_(torch.from_numpy(values.copy()), name)).numpy()


def barrier(name: str) -> None:
    """Wait until all ranks have called this."""
    sum_float64(np.zeros(1), name)


def ring_all_reduce_bytes(payload: int, size: int) -> int:
    """Return the bytes that one rank sends in a ring all-reduce of `payload` bytes over `size` ranks."""
    return payload * 2 * (size - 1) // size
