"""Hooks in torch that see the steps of any training loop: its batches, backward passes, waits and updates.

What other ranks are waited for in: the end of a backward in DistributedDataParallel, its exchange of buffers,
`torch.distributed`'s Work.wait (FSDP, own collectives), and `synchronize` of Horovod's optimizers.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import dataloader

from hvdtrain.programs.step_clock import CudaClock, HostClock, Mark, StepClock, StepMarks
from hvdtrain.system.stolen_time import StolenTimeMonitor

HOOKED_PARAMETERS = 64  # at most, while they show the steps: a hook takes 3 us
HOOKED_AGAIN_STEPS = 100  # after which parameters that are new, or trained only now, are noticed


class LoopHooks:
    """Marks the steps of one model's training in the thread that makes this; `on_step` gets each of them.

    Args:
        model: whose backward passes count.
        optimizers: whose steps count; none: those of all optimizers of the model's parameters.
        on_step: called at the end of each update with its marks and their clock.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], on_step: Callable[[StepMarks, StepClock], None]
    ) -> None:
        self._model, self._on_step = model, on_step
        self.stolen_time = StolenTimeMonitor()
        self._counts = {id(optimizer): True for optimizer in optimizers}
        self._all_optimizers = not optimizers
        self._seen: list[Optimizer] = []  # keeps their ids
        self._thread = threading.get_ident()
        self._undo = contextlib.ExitStack()
        self._clock: StepClock = HostClock()
        self._marks = StepMarks(self._clock.put_mark())
        self._steps, self._depth = 0, 0  # depth: Horovod's step calls the step of the optimizer that it wraps
        self._waits_open, self._data_open = False, False
        self._callback_queued = False
        self._hooked: dict[int, nn.Parameter] = {}

    def install(self) -> None:
        """Install all hooks."""
        self._keep(register_optimizer_step_pre_hook(self._before_step))
        self._keep(register_optimizer_step_post_hook(self._after_step))
        for module in find_entry_modules(self._model):
            self._keep(module.register_forward_pre_hook(self._before_forward))
        self._hook_parameters()
        self._replace(dataloader._BaseDataLoaderIter, "__next__", self._time_batch)
        self._replace(DistributedDataParallel, "_sync_buffers", self._time_wait)
        if torch.distributed.is_available():
            self._replace(torch.distributed.Work, "wait", self._time_wait)
            self._replace(torch.cuda.Stream, "wait_event", self._time_stream_wait)

    def remove(self) -> None:
        """Remove all hooks."""
        self._undo.close()
        self.stolen_time.close()

    def time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the same batches; the wait for them is data time."""
        take = functools.partial(self._time_batch, next, batches)
        while True:
            try:
                batch = take()
            except StopIteration:
                return
            yield batch

    def _keep(self, handle: Any) -> None:
        self._undo.callback(handle.remove)

    def _replace(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Call `around(function, *args)` instead of a method, until `remove`."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return around(function, *args, **kwargs)

        is_own = name in vars(owner)
        setattr(owner, name, replaced)
        self._undo.callback(*((setattr, owner, name, function) if is_own else (delattr, owner, name)))

    def _hook_parameters(self, *, all_of_them: bool = False) -> None:
        """Hook some parameters from all over the model: the gradient of one shows that a backward runs."""
        trained: list[Any] = [one for one in self._model.parameters() if one.requires_grad]
        stride = 1 if all_of_them else -(-len(trained) // HOOKED_PARAMETERS) or 1
        for parameter in trained[::stride]:
            if id(parameter) not in self._hooked:
                self._hooked[id(parameter)] = parameter
                self._keep(parameter.register_post_accumulate_grad_hook(self._after_gradient))

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        # Within torch.compile this is left out, and the first batch's end begins the step.
        if torch.compiler.is_compiling() or self._marks.forward is not None:
            return
        if torch.is_grad_enabled() and threading.get_ident() == self._thread:
            if self._steps == 0:
                self._choose_clock()
            self._marks.mark_forward(self._clock.put_mark())

    def _choose_clock(self) -> None:
        device = next((one.device for one in self._model.parameters()), torch.device("cpu"))
        if device.type == "cuda" and isinstance(self._clock, HostClock):
            self._clock = CudaClock(device)
            self._marks = StepMarks(self._clock.put_mark(), data=self._marks.data)

    def _after_gradient(self, parameter: Any) -> None:
        if self._callback_queued or torch.compiler.is_compiling():
            return
        self._callback_queued = True
        # Runs when all gradients are there, before what DDP queues later to wait for its collectives.
        _queue_callback(self._after_local_backward)

    def _after_local_backward(self) -> None:
        mark = self._clock.put_mark()
        _queue_callback(functools.partial(self._after_backward, mark))

    def _after_backward(self, last_gradient: Mark) -> None:
        self._callback_queued = False
        mark = self._clock.put_mark()
        self._marks.waits.append((last_gradient, mark))
        self._marks.mark_backward_end(mark)

    def _time_wait(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what waits for other ranks. Of waits within waits the outermost counts."""
        if self._waits_open or isinstance(self._clock, CudaClock) or threading.get_ident() != self._thread:
            return function(*args, **kwargs)
        return self._mark_wait(function, *args, **kwargs)

    def _mark_wait(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._waits_open, begin = True, self._clock.put_mark()
        try:
            return function(*args, **kwargs)
        finally:
            self._waits_open = False
            end = self._clock.put_mark()
            self._marks.waits.append((begin, end))
            if self._data_open and isinstance(self._clock, HostClock):
                self._marks.data -= end - begin  # a loader that gets its batches from another rank

    def _time_stream_wait(self, function: Callable[..., Any], stream: torch.cuda.Stream, event: Any) -> Any:
        """Let the stream of the forward wait for a collective in another stream (FSDP)."""
        if self._waits_open or not isinstance(self._clock, CudaClock) or stream != self._clock._stream:
            return function(stream, event)
        return self._mark_wait(function, stream, event)

    def _time_batch(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._data_open or threading.get_ident() != self._thread:
            return function(*args)
        self._depth = 0  # a step that raised has not ended
        self._data_open, begin = True, time.perf_counter()
        try:
            return function(*args)
        finally:
            self._data_open = False
            self._marks.data += time.perf_counter() - begin

    def _is_counted(self, optimizer: Optimizer) -> bool:
        counted = self._counts.get(id(optimizer))
        if counted is None:
            own = {id(parameter) for parameter in self._model.parameters()}
            trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
            counted = self._all_optimizers and any(id(parameter) in own for parameter in trained)
            self._counts[id(optimizer)] = counted
            self._seen.append(optimizer)
        return counted

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread or not self._is_counted(optimizer):
            return
        self._depth += 1
        synchronize = getattr(optimizer, "synchronize", None)
        if synchronize is not None and not hasattr(synchronize, "__wrapped__"):
            self._replace(optimizer, "synchronize", self._time_synchronize)

    def _time_synchronize(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `synchronize` of a Horovod optimizer: on a GPU it makes the stream wait, on a CPU it polls."""
        if self._waits_open:
            return function(*args)
        self.stolen_time.begin_wait()
        try:
            return self._mark_wait(function, *args)
        finally:
            self.stolen_time.end_wait()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if threading.get_ident() != self._thread or not self._is_counted(optimizer):
            return
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return
        marks = self._marks
        marks.end, marks.stolen = self._clock.put_mark(), self.stolen_time.take()
        if marks.backward_end is None or self._steps % HOOKED_AGAIN_STEPS == 0:
            self._hook_parameters(all_of_them=marks.backward_end is None)
        self._steps += 1
        self._callback_queued = False
        self._marks = StepMarks(marks.end)
        self._on_step(marks, self._clock)
        if isinstance(self._clock, HostClock):
            self._marks.begin = self._clock.put_mark()  # without what `on_step` took


def _queue_callback(function: Callable[[], None]) -> None:
    """Call a function at the end of the backward that runs, after those that were queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def find_entry_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules by whose call a forward may begin: the model, or what a wrapper or a loop calls of it."""
    found, level = [model], [model]
    for _ in range(2):
        if any(is_compiled(module) for module in level):
            break  # its inside is called by code that torch has compiled
        level = [child for module in level for child in module.children()]
        found += level
    return [module for module in found if module is model or not is_compiled(module)]


def is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile has made this module, or compiles its calls."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
