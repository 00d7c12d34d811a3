"""Several servers: each holds a part of the parameters and the optimizer's state of these.

Rank 0 decides everything; the other servers do what it says, in the order in which it says it, so that all parts of the
weights are of the same version. What travels between them is small, but for checkpoints and evaluations.

    rank 0 -> server    ["weights", worker]               send your part to a worker, which has got an item
                        ["take", worker, delay, strength] receive your part of its gradient; with delay compensation
                        ["drop", worker]                  the same, of a late one
                        ["sum", [[worker, factor], ...], sums, is_finite, examples]
                        ["apply", factor, seed], ["skip"] after the answer
                        ["fetch"], ["state"]              send your part of the weights, or all of your state
                        ["load", bytes], ["set"]          take a state, or weights
                        ["end"], ["failed", class, text, rank]
    server -> rank 0    ["summed", names]                 the parameters whose gradients are not finite
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hvdtrain.comm.messages import Messages
from hvdtrain.recipe.framework import StepVotes
from hvdtrain.server.items import Bytes
from hvdtrain.server.roles import Roles, decode_failure
from hvdtrain.server.served_step import ServedStep
from hvdtrain.system import activity


def divide_parameters(sizes: Sequence[int], servers: int) -> list[list[int]]:
    """Return the places of each server's parameters: the largest ones first, each to the server that has least."""
    parts: list[list[int]] = [[] for _ in range(servers)]
    bytes_of = [0] * servers
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        server = bytes_of.index(min(bytes_of))
        parts[server].append(number)
        bytes_of[server] += sizes[number]
    return [sorted(own) for own in parts]


class OtherServers:
    """Rank 0's view of the other servers; there may be none."""

    def __init__(self, roles: Roles, messages: Messages, step: ServedStep) -> None:
        self.parts = divide_parameters(step.parameter_bytes(), roles.servers)
        self._ranks, self._messages, self._step = range(1, roles.servers), messages, step

    def tell(self, *command: object) -> None:
        """Send a command to all of them."""
        for rank in self._ranks:
            self._messages.send(rank, command)

    def collect_nonfinite(self) -> tuple[str, ...]:
        """Return the names of parameters whose summed gradients are not finite, after "sum"."""
        return tuple(name for rank in self._ranks for name in self._messages.receive(None, rank)[1][1])

    def send_weights(self) -> None:
        """Give them their parts of rank 0's weights."""
        for rank in self._ranks:
            array = self._step.make_array(self.parts[rank])
            self._step.read_weights(array, self.parts[rank])
            self._messages.send(rank, ["set"], array)

    def fetch_weights(self) -> None:
        """Let rank 0's model have all weights as they are now."""
        self.tell("fetch")
        for rank in self._ranks:
            array = self._step.make_array(self.parts[rank])
            self._messages.receive(array, rank)
            self._step.write_weights(array, self.parts[rank])

    def fetch_states(self) -> None:
        """Let rank 0's optimizer have all state, until `keep_optimizer_state`."""
        self.tell("state")
        for rank in self._ranks:
            _, size = self._messages.receive(None, rank)
            data = np.empty(size, np.uint8)
            self._messages.receive(data, rank)
            self._step.take_optimizer_state(data.tobytes(), self.parts[rank])

    def load_state(self, data: bytes) -> None:
        """Let all have a checkpoint's state, rank 0 last."""
        array = np.frombuffer(data, np.uint8)
        self.tell("load", len(data))
        for rank in self._ranks:
            self._messages.send(rank, [], array)


class GatheredStep:
    """Rank 0's step among several servers: whole where all of the model is needed, else as it is."""

    def __init__(self, step: ServedStep, others: OtherServers) -> None:
        self._step, self._others = step, others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def load_batches(self, split: str, *args: Any) -> Any:
        """Have all weights before an evaluation."""
        if split != "train":
            self._others.fetch_weights()
        return self._step.load_batches(split, *args)

    def gather_state(self) -> bytes:
        """Return the state of all servers."""
        self._others.fetch_weights()
        self._others.fetch_states()
        data = self._step.gather_state()
        self._step.keep_optimizer_state(self._others.parts[0])
        return data

    def load_state(self, data: bytes) -> None:
        """Give all servers a state."""
        self._step.load_state(data)
        self._step.keep_optimizer_state(self._others.parts[0])
        self._others.load_state(data)


class ShardServer:
    """A server other than rank 0."""

    def __init__(self, roles: Roles, rank: int, messages: Messages, step: ServedStep) -> None:
        self._own = divide_parameters(step.parameter_bytes(), roles.servers)[rank]
        self._messages, self._step = messages, step
        self._gradients: dict[int, Bytes] = {}  # by worker
        self._read: dict[int, Bytes] = {}  # by worker: the weights that it has
        self._spare = step.make_array(self._own)

    def serve(self) -> Any:
        """Do what rank 0 says until the run has ended; return its summary. Raises the error with which it has."""
        while True:
            activity.enter_activity("waiting for rank 0", waits=True)
            _, (kind, *values) = self._messages.receive(self._spare, 0)
            activity.enter_activity("serving its part of the model")
            if kind == "failed":
                raise decode_failure(*values)
            if kind == "end":
                return values[0]
            getattr(self, f"_on_{kind}")(*values)

    def _on_weights(self, worker: int) -> None:
        array = self._read.setdefault(worker, self._step.make_array(self._own))
        self._step.read_weights(array, self._own)
        self._messages.send(worker, ["weights"], array)

    def _on_take(self, worker: int, is_delayed: bool, strength: float | None) -> None:
        array = self._gradients.setdefault(worker, self._step.make_array(self._own))
        self._messages.receive(array, worker)
        if is_delayed and strength is not None:
            self._step.compensate_delay(array, self._read[worker], strength, self._own)

    def _on_drop(self, worker: int) -> None:
        self._messages.receive(self._spare, worker)

    def _on_sum(self, weighted: list[list[float]], sums: list[float], is_finite: bool, examples: int) -> None:
        self._step.start_step([], 1.0, False)
        for worker, factor in weighted:
            self._step.add_gradients(self._gradients[int(worker)], factor, self._own)
        self._step.add_scores(np.array(sums), is_finite)
        self._step.cast_votes(StepVotes(examples=examples))
        result = self._step.all_reduce()
        self._messages.send(0, ["summed", list(result.nonfinite_gradients)])

    def _on_apply(self, factor: float, seed: list[int]) -> None:
        self._step.apply_update(factor, seed)

    def _on_skip(self) -> None:
        self._step.skip_update()

    def _on_fetch(self) -> None:
        self._step.read_weights(self._spare, self._own)
        self._messages.send(0, ["weights"], self._spare)

    def _on_state(self) -> None:
        data = np.frombuffer(self._step.gather_state(), np.uint8)
        self._messages.send(0, data.nbytes)
        self._messages.send(0, [], data)

    def _on_load(self, size: int) -> None:
        data = np.empty(size, np.uint8)
        self._messages.receive(data, 0)
        self._step.load_state(data.tobytes())
        self._step.keep_optimizer_state(self._own)

    def _on_set(self) -> None:
        self._step.write_weights(self._spare, self._own)
