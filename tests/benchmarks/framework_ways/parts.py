"""A step taken apart, from outside: timers around the bridge's functions, those of its backends, and the exchange's.

A timer counts only the time that no timer within it counts, so that the parts add up to `train_step`:

    forward, backward   the framework's compiled score and its derivatives; with them what goes in
    DLPack              arrays become tensors, and tensors arrays: scores, gradients, buckets, parameters, state
    bridge              what else the bridge does
    bucket copy         gradients into buckets, as for torch
    exchange            until they are summed
    update              the framework's compiled update
    trainer             the rest: the batch, votes, sums, autograd's hooks
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks.framework_ways.pace import Pace


class Timers:
    """Timers of one thread."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._running: list[str] = []  # parts, each within the one before
        self._since = 0.0

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **keywords: Any) -> Any:
            self._count()
            self._running.append(part)
            try:
                return function(*args, **keywords)
            finally:
                self._count()
                self._running.pop()

        return timed

    def _count(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._pace.add(self._running[-1], now - self._since)
        self._since = now

    def patch(self, owner: Any, name: str, part: str) -> None:
        """Time a method of a class, or a function of a module."""
        setattr(owner, name, self.wrap(part, getattr(owner, name)))


def take_apart(pace: Pace) -> None:
    """Time the parts of a bridged recipe's step."""
    from hvdtrain.bridge import gradients, model_bridge, optimizer
    from hvdtrain.exchange.buckets import Bucket
    from hvdtrain.torch.step import TorchStep
    from hvdtrain.training import loop

    timers = Timers(pace)
    timers.patch(loop, "train_step", "trainer")
    timers.patch(TorchStep, "all_reduce", "exchange")
    timers.patch(Bucket, "start_reduction", "exchange")
    timers.patch(Bucket, "put_gradient", "bucket copy")
    timers.patch(model_bridge.ModelBridge, "score", "bridge")
    timers.patch(optimizer.BridgeOptimizer, "step", "bridge")
    gradients.PullBack.backward = staticmethod(timers.wrap("bridge", gradients.PullBack.backward))
    original = model_bridge.ModelBridge.__init__

    def time_backend(bridge: Any, functions: Any, backend: Any, *arguments: Any) -> None:
        original(bridge, functions, TimedBackend(backend, timers), *arguments)

    model_bridge.ModelBridge.__init__ = time_backend  # type: ignore[method-assign]


class TimedBackend:
    """A backend whose functions and compiled programs are timed."""

    def __init__(self, backend: Any, timers: Timers) -> None:
        self._backend, self._timers = backend, timers
        self.import_tensor = timers.wrap("DLPack", backend.import_tensor)
        self.export_array = timers.wrap("DLPack", backend.export_array)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def compile_score(self, *arguments: Any) -> Any:
        return TimedProgram(self._backend.compile_score(*arguments), self._timers)

    def compile_update(self, *arguments: Any) -> Any:
        return self._timers.wrap("update", self._backend.compile_update(*arguments))


class TimedProgram:
    """A score whose forward pass and pullback are timed."""

    def __init__(self, program: Any, timers: Timers) -> None:
        self._program, self._timers = program, timers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def score_for_training(self, *arguments: Any) -> Any:
        returned, pullback = self._timers.wrap("forward", self._program.score_for_training)(*arguments)
        return returned, self._timers.wrap("backward", pullback)
