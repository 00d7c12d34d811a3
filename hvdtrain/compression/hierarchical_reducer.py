"""How a compressed bucket is summed if each host encodes its ranks' sum once: `--hierarchy host`.

With L ranks on each of H hosts, the bucket is cut into L shards of H parts, in whole blocks. x: gradients and residual
of a rank, C encode-and-decode, s the residual of a part's sum:

               host a, rank 0                     host a, rank 1
    round 0    x = [x00 x01 | x10 x11]            x = [x00 x01 | x10 x11]
               ------------ all-to-all in the host: shard l goes to its rank l ------------
    round 1    y = sum of shard 0                 y = sum of shard 1              over the host's ranks
               residual = y - C(y)                residual = y - C(y)             each is of a host and a shard
               ------------ all-to-all across hosts: part h goes to host h ----------------
    round 2    t = sum C(y of part a) + s         the same of shard 1             over hosts
               encode t; s = t - C(t)
               ------------ all-gather across hosts: the shard's parts, encoded -----------
    round 3    ------------ all-gather in the host: all shards, encoded -------------------
    finish     flat = [C(t00) C(t01) | C(t10) C(t11)]        the same bits on all ranks

What leaves a host is a codec's payload of one bucket, not of one for each rank.

A residual is as long as flat, and zero outside the rank's shard; the sum over a host's ranks adds it to the shard. So
it is saved and divided as any other, and ranks may be on other hosts then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.compression.codec import Codec, RandomKey
from hvdtrain.compression.reducer import CompressedReducer, ReducerOptions
from hvdtrain.system import activity

if TYPE_CHECKING:
    from hvdtrain.comm.host_groups import HostGroups  # which imports Horovod; a hook of DDP needs none

NUM_ROUNDS = 4


class RoundOrder:
    """Starts the rounds of all buckets of an exchange, each in the same order on all ranks.

    torch.distributed matches collectives by their order. Each of the four rounds has a process group of its own, in
    which buckets follow each other in the order of the exchange, whichever is full first.

    Over Gloo a round starts as soon as the one before it has arrived; over NCCL, whose groups may not overtake each
    other, all rounds but the first start together at the end of the step.
    """

    def __init__(self, groups: HostGroups) -> None:
        """Start nothing yet. groups: of this rank."""
        self.groups = groups
        self._polls = groups.row.device.type == "cpu"
        self._reducers: list[HierarchicalReducer] = []
        self._started = [0] * NUM_ROUNDS  # by round, how many of the reducers have started it

    def set_reducers(self, reducers: Sequence[HierarchicalReducer]) -> None:
        """Set what takes part in each step from now on, in this order, on all ranks alike; between two steps."""
        self._reducers, self._started = list(reducers), [0] * NUM_ROUNDS

    def start_rounds(self) -> bool:
        """Start every round whose input is there and whose turn it is; return whether there was one."""
        if self._started == [len(self._reducers)] * NUM_ROUNDS:
            self._started = [0] * NUM_ROUNDS  # the next step
        any_started = False
        for number in range(NUM_ROUNDS if self._polls else 1):
            while self._started[number] < len(self._reducers):
                reducer = self._reducers[self._started[number]]
                if not reducer.is_ready_for(number):
                    break
                self._start_round(reducer, number)
                any_started = True
        return any_started

    def _start_round(self, reducer: HierarchicalReducer, number: int) -> None:
        reducer.start_round(number)
        self._started[number] += 1

    def finish_rounds(self, reducer: HierarchicalReducer) -> None:
        """Start rounds until all of a reducer's have arrived."""
        if not self._polls:
            for number in range(1, NUM_ROUNDS):
                for other in self._reducers[self._started[number] :]:
                    self._start_round(other, number)
            return
        pause = 20e-6
        with activity.waiting_in_collective(reducer.name):
            while not reducer.is_ready_for(NUM_ROUNDS):
                # As in `collectives.wait`, the pauses must not stay short.
                if self.start_rounds():
                    pause = 20e-6
                else:
                    time.sleep(pause)
                    pause = min(2 * pause, 1e-3)


class HierarchicalReducer(CompressedReducer):
    """Sums or averages `flat` by a REDUCE_SCATTER codec that encodes the sum of each host.

    Attributes:
        order: of the rounds of all buckets.
        wire_bytes: bytes that this rank sent to other hosts in the last step.
    """

    def __init__(
        self,
        name: str,
        flat: Tensor,
        codec: Codec,
        key: RandomKey,
        options: ReducerOptions,
        order: RoundOrder,
    ) -> None:
        """Arguments as of `CompressedReducer`; order: of the exchange."""
        super().__init__(name, flat, codec, key, options)
        self.order = order
        row, column = order.groups.row, order.groups.column
        self.row_size, self.column_size = row.size(), column.size()
        shard_size = self.column_size * self.part_size
        begin = min(row.rank() * shard_size, len(flat))
        self._own_shard = slice(begin, min(begin + shard_size, len(flat)))
        self.parts = order.groups.number_parts()
        self._input: Tensor | None = None  # of the round that is next, until it is started
        self._rounds_started = NUM_ROUNDS  # of this step

    def is_ready_for(self, number: int) -> bool:
        """Return whether a round may be started: all of the step's before it have arrived. NUM_ROUNDS: all have."""
        if self._rounds_started != number:
            return False
        if number == 0:
            return self._input is not None
        return self._handle is not None and collectives.is_complete(self._handle)

    def start_round(self, number: int) -> None:
        """Take what the round before has brought, and start one."""
        self._rounds_started = number + 1
        groups, name = self.order.groups, f"{self.name}.{number}"
        if number == 0:
            assert self._input is not None
            self._handle, self._input = collectives.all_to_all_async(self._input, name, groups.row), None
            return
        received = self._wait_for_collective()
        if number == 1:
            payload = self._encode_host_sum(received.view(self.row_size, -1))
            self._handle = collectives.all_to_all_async(payload, name, groups.column)
        elif number == 2:
            payload = self._encode_total(received.view(self.column_size, -1))
            self._handle = collectives.all_gather_async(payload, name, groups.column.second)
        else:
            self._handle = collectives.all_gather_async(received, name, groups.row.second)

    def _encode_host_sum(self, shards: Tensor) -> Tensor:
        """Return the payload of this rank's shard, (ranks of the host, values of a shard); keep what it leaves."""
        total = shards[0] + shards[1]  # in the order of ranks
        for shard in shards[2:]:
            total += shard
        rows = total.view(self.column_size, self.part_size)
        payload = self.codec.encode(rows, self._key)
        self.wire_bytes = payload[0].numel() * (self.column_size - 1)  # its own part stays here
        if self.next_residual is not None:
            left = (rows - self.codec.decode(payload, self.part_size, self._key)).flatten()
            own = self.next_residual.zero_()[self._own_shard]
            own.copy_(left[: len(own)])
        return payload.flatten()

    def _encode_total(self, parts: Tensor) -> Tensor:
        """Return the payload of the sum over hosts of this rank's part."""
        total = self.codec.decode(parts, self.part_size, self._key).sum(0)
        payload = self._encode_sum(total)
        self.wire_bytes += payload.numel() * (self.column_size - 1)
        return payload.flatten()

    def _send(self, x: Tensor, fused: bool) -> None:
        self._input, self._rounds_started = self._pad_into_rows(x).flatten(), 0
        self.wire_bytes = 0
        self.order.start_rounds()

    def start_second_round(self, wait: bool = True) -> None:
        """Start what rounds of any bucket can be started."""
        if not self._in_warmup:
            self.order.start_rounds()

    def finish_reduction(self) -> None:
        """Wait and decode the sum, or mean, into flat."""
        if not self._in_warmup:
            begin = time.perf_counter()
            self.order.finish_rounds(self)
            self.waited += time.perf_counter() - begin
        super().finish_reduction()
