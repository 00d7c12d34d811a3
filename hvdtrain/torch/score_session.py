"""The collectives of a recipe's `score`: their order in a pass, and the part of a rank that has no examples in it.

The trial before the first step calls `score` without any communication and records which exchanges a pass makes, in
forward and backward. In a step, each rank with examples makes them as `score` and its gradient come to them, and a rank
without examples takes part in each by an empty part:

    rank 0: 3 examples            rank 1: 2 examples            rank 2: none; `join_pass` by the trial's record
    all_gather(x): (3, d)         all_gather(x): (2, d)         0 rows of shape (d,)           name "score.0"
    backward: the gradient of     backward: likewise            zeros (5, d)                   name "score.0.gradient"
      (5, d), summed over ranks

Exchanges of one name belong together, so that a rank without examples may start all of them at once. What `score`
gathers is tied to its loss: each exchange in backward takes place on each rank, also if a rank's loss does not depend
on what it has gathered.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdtrain.comm import collectives
from hvdtrain.exchange.step_options import StepOptions
from hvdtrain.system.errors import UserError
from hvdtrain.torch.pass_record import CallRecord, Exchange, PassRecord

# What Horovod gathers as it is; other types travel as bytes.
GATHERED_DTYPES = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8)
SEVERAL_OPTIMIZERS_REFUSAL = (
    "which a recipe with several optimizers cannot use: its losses are differentiated one by one; use one optimizer "
    "with several parameter groups, and batch or group norm in place of SyncBatchNorm"
)
MISMATCH_TEXT = "Mismatched"  # how Horovod's errors begin if ranks start an exchange with different shapes or types


class ScoreSession:
    """The collectives that `score` calls in the passes of a training.

    Attributes:
        recipe_name: for messages.
        refusal: why they are refused, as a clause that follows their name; "" if they are not.
        record: of the trial; None: not known, and not checked.
        evaluation_records: of trials of evaluations, by split; only on ranks that have needed one.
        in_backward: whether the forward part of the pass is over: what is called now is computed again (checkpointing).
        bytes_sent, waited: by this rank in them, in a step; `waited` in seconds.
        join_lookup: takes part in an exchange of a lookup without examples.
    """

    def __init__(self, recipe_name: str = "", refusal: str = "") -> None:
        self.recipe_name, self.refusal = recipe_name, refusal
        self.record: PassRecord | None = None
        self.evaluation_records: dict[str, PassRecord] = {}
        self.bytes_sent, self.waited, self.in_backward = 0, 0.0, False
        self.join_lookup: Callable[[Exchange, bool], None] | None = None
        self._recording: PassRecord | None = None  # in a trial
        self._expected: PassRecord | None = None  # of the present pass
        self._num_calls = 0
        self._tokens: list[Tensor] = []

    @property
    def is_recording(self) -> bool:
        """Whether this is a trial, which communicates nothing."""
        return self._recording is not None

    @property
    def num_ranks(self) -> int:
        """How many ranks exchange: one in a trial, and in a process without Horovod."""
        return 1 if self._recording is not None or not collectives.is_initialized() else collectives.size()

    @contextlib.contextmanager
    def record_pass(self) -> Iterator[PassRecord]:
        """Record the exchanges of a pass in a block, forward and backward, and communicate nothing."""
        before = self._recording, self._expected
        self._recording, self._expected = PassRecord(), None
        self._num_calls, self._tokens = 0, []
        try:
            yield self._recording
        finally:
            self._recording, self._expected = before
            self.in_backward = False
            self._num_calls, self._tokens = 0, []

    @contextlib.contextmanager
    def refuse_calls(self) -> Iterator[None]:
        """Refuse collectives in a block: in `outputs`, in which a rank without examples has no part."""
        before, self.refusal = self.refusal, self.refusal or "which is refused in outputs: call it in score"
        try:
            yield
        finally:
            self.refusal = before

    def start_step(self) -> None:
        """Start a step: count its bytes and seconds."""
        self.bytes_sent, self.waited = 0, 0.0

    def start_pass(self, *, training: bool) -> None:
        """Start a pass. training: its calls must be those of the trial."""
        self.in_backward = False
        self._num_calls, self._tokens = 0, []
        self._expected = self.record if training else None

    def end_forward(self, loss: Tensor) -> Tensor:
        """End the forward part of a pass; return its loss, tied to all that was exchanged and has a gradient.

        Raises UserError if there were fewer calls than in the trial.
        """
        if self._recording is not None:
            self._recording.num_forward_calls = self._num_calls
        elif self._expected is not None and self._num_calls < self._expected.num_forward_calls:
            raise UserError(
                f"{self.recipe_name}.score has called {self._num_calls} collectives of hvdtrain, and "
                f"{self._expected.num_forward_calls} in its trial before the first step: call the same ones in every "
                "step, for a rank without examples repeats those of the trial"
            )
        self.in_backward = True
        tokens, self._tokens = self._tokens, []
        return TieLoss.apply(loss, *tokens) if tokens else loss

    def start_call(self, function: str, x: Tensor, shape: Sequence[int]) -> Call:
        """Check a call of a collective in `score` against the trial, or record it in a trial.

        Args:
            function: its name.
            x: what it is called with.
            shape: what of its shape must be as in the trial: that of a row, or all.

        Raises:
            UserError: it is not one of the calls of the trial, or refused as such.
        """
        if self.refusal:
            raise UserError(f"{self.recipe_name}.score calls {function}, {self.refusal}")
        record, place = CallRecord(function, tuple(shape), x.dtype), self._num_calls
        self._num_calls += 1
        if self._recording is not None:
            self._recording.calls.append(record)
        elif self._expected is not None:
            self._check_call(record, place, self._expected.calls)
        return Call(self, f"score.{place}")

    def _check_call(self, call: CallRecord, place: int, expected: Sequence[CallRecord]) -> None:
        first = expected[place] if place < len(expected) else None
        if first is not None and (call.function, call.dtype) == (first.function, first.dtype):
            if call.function != "all_reduce" or call.shape == first.shape:
                return
            raise UserError(
                f"{self.recipe_name}.score calls all_reduce with a tensor of shape {call.shape}, and in its trial with "
                f"two examples of shape {first.shape}: sum over the examples first, or use all_gather"
            )
        raise UserError(
            f"{self.recipe_name}.score calls {call} as its collective number {place + 1}, and in its trial before the "
            f"first step {first or 'no such one'}: call the same ones in every step, for a rank without examples "
            "repeats those of the trial"
        )

    def tie(self, token: Tensor) -> None:
        """Let the loss of this pass depend on a scalar, so that its backward function is called."""
        self._tokens.append(token)

    def join_pass(self, device: torch.device, split: str = "train") -> None:
        """Take part in a pass without an example, by the record of a trial: in training, or of an evaluation set."""
        record = (self.record if split == "train" else self.evaluation_records[split]) or PassRecord()
        if any(exchange.is_lookup for exchange in record.exchanges):
            return self._join_in_order(record.exchanges, device, split == "train")
        of_known_shape = [exchange for exchange in record.exchanges if not exchange.rows_of]
        begun = {e.name: self._start_empty(e, device, {}) for e in of_known_shape}
        results = {name: self.finish(name, handle) for name, handle in begun.items()}
        of_gathers = [exchange for exchange in record.exchanges if exchange.rows_of]
        begun = {e.name: self._start_empty(e, device, results) for e in of_gathers}
        for name, handle in begun.items():
            self.finish(name, handle)

    def _join_in_order(self, exchanges: Sequence[Exchange], device: torch.device, is_training: bool) -> None:
        """Take part in exchanges one after the other: lookups have no names by which they find each other."""
        results: dict[str, Tensor] = {}
        for exchange in exchanges:
            if exchange.is_lookup and self.join_lookup is not None:
                self.join_lookup(exchange, is_training)
            else:
                results[exchange.name] = self.finish(exchange.name, self._start_empty(exchange, device, results))

    def _start_empty(self, e: Exchange, device: torch.device, found: dict[str, Tensor]) -> collectives.Handle | Tensor:
        rows = [len(found[e.rows_of])] if e.rows_of else [0] * (e.operation == "all_gather")
        where = device if e.on_device else "cpu"
        return self.start(e, torch.zeros((*rows, *e.shape), dtype=e.dtype, device=where))

    def record_exchange(self, exchange: Exchange) -> None:
        """Record an exchange in a trial."""
        if self._recording is not None:
            self._recording.exchanges.append(exchange)

    def start(self, exchange: Exchange, x: Tensor) -> collectives.Handle | Tensor:
        """Start an exchange of a contiguous tensor, which an all-reduce overwrites; `finish` returns the result."""
        self.record_exchange(exchange)
        if self.num_ranks == 1:
            return x.clone()
        if exchange.operation == "all_gather":
            self.bytes_sent += x.nbytes * (self.num_ranks - 1)
            return collectives.all_gather_async(x, exchange.name)
        self.bytes_sent += collectives.ring_all_reduce_bytes(x.nbytes, self.num_ranks)
        return collectives.all_reduce_async_(x, exchange.name)

    def finish(self, name: str, handle: collectives.Handle | Tensor) -> Tensor:
        """Wait for an exchange. Raises UserError if ranks have started it with different shapes or types."""
        if isinstance(handle, Tensor):
            return handle
        begin = time.perf_counter()
        try:
            return collectives.wait(handle)
        except collectives.PeersLost as error:
            if not str(error).startswith(MISMATCH_TEXT):
                raise
            raise UserError(
                f"{self.recipe_name}.score calls collective {name!r} with different shapes or types on different "
                f"ranks: they must be equal but for the number of rows of all_gather ({error})"
            ) from error
        finally:
            self.waited += time.perf_counter() - begin


class Call:
    """One call of a collective in `score`, with its exchanges in forward and backward."""

    def __init__(self, session: ScoreSession, name: str) -> None:
        self.session, self.name = session, name
        self._num_sums: dict[str, int] = {}  # by what is summed

    @property
    def is_alone(self) -> bool:
        """Whether this rank exchanges with no other."""
        return self.session.num_ranks == 1

    def gather_rows(self, x: Tensor) -> Tensor:
        """Return every rank's (B, ...) tensor, joined in the order of ranks."""
        return self._finish_gather(x, *self._start_gather(x, ""))

    def gather_examples(self, x: Tensor) -> tuple[Tensor, slice]:
        """Return every rank's (B, ...) tensor, joined in the order of ranks, and which rows are this rank's."""
        own = torch.tensor([[collectives.rank() if not self.is_alone else 0, len(x)]])
        started, counted = self._start_gather(x, ""), self._start_gather(own, ".rows")
        gathered = self._finish_gather(x, *started)
        counts = self._finish_gather(own, *counted).tolist()
        first = sum(rows for rank, rows in counts if rank < own[0, 0])
        return gathered, slice(first, first + len(x))

    def _start_gather(self, x: Tensor, suffix: str) -> tuple[str, collectives.Handle | Tensor]:
        wire = x.detach().contiguous()
        if wire.dtype not in GATHERED_DTYPES:
            wire = wire.unsqueeze(-1).view(torch.uint8)
        name = self.name + suffix
        exchange = Exchange(name, "all_gather", tuple(wire.shape[1:]), wire.dtype, on_device=not suffix)
        return name, self.session.start(exchange, wire)

    def _finish_gather(self, x: Tensor, name: str, handle: collectives.Handle | Tensor) -> Tensor:
        gathered = self.session.finish(name, handle)
        if gathered.dtype != x.dtype:
            gathered = gathered.view(x.dtype).squeeze(-1)
        return gathered

    def sum(self, x: Tensor, suffix: str = "", *, rows_of_gather: bool = False) -> Tensor:
        """Return the sum over ranks of a tensor; 16-bit floats are summed in float32, integers in int64.

        Args:
            x: of one shape on all ranks.
            suffix: of the name.
            rows_of_gather: it has as many rows as what this call has gathered.
        """
        place = self._num_sums[suffix] = self._num_sums.get(suffix, 0) + 1
        name = f"{self.name}{suffix}" + (f".{place}" if place > 1 else "")
        wire = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        low = wire.element_size() < 4
        dtype = (torch.float32 if low else wire.dtype) if wire.is_floating_point() else torch.int64
        wire = wire.to(dtype, copy=True, memory_format=torch.contiguous_format)
        shape = tuple(wire.shape[1:] if rows_of_gather else wire.shape)
        exchange = Exchange(name, "all_reduce", shape, dtype, rows_of=self.name if rows_of_gather else "")
        total = self.session.finish(name, self.session.start(exchange, wire))
        if x.is_complex():
            return torch.view_as_complex(total)
        return total if x.dtype == torch.bool else total.to(x.dtype)


class TieLoss(torch.autograd.Function):
    """A loss that depends on some scalars, with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *tokens: Tensor) -> Tensor:
        ctx.tokens = [(token.dtype, token.device) for token in tokens]
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros((), dtype=dtype, device=device) for dtype, device in ctx.tokens)


def find_refusal(options: StepOptions) -> str:
    """Return why the collectives of `score` are refused in a run with these options; "" if they are not."""
    if options.model_flag:
        return f"which {options.model_flag} refuses: ranks have passes without examples of their own; leave that out"
    if not options.exchange.deterministic:
        return ""
    return "which --deterministic refuses: its result depends on the ranks in its last bits; leave out --deterministic"


class _ActiveSession:
    session = ScoreSession()  # outside a training


def get_session() -> ScoreSession:
    """Return the session of the training that this process is in."""
    return _ActiveSession.session


def enter_session(session: ScoreSession | None) -> None:
    """Make a session the present one; None: there is no training."""
    _ActiveSession.session = session or ScoreSession()
