"""The exchange of a DistributedDataParallel's gradients by hvdtrain's reducers, over its own process group.

DDP calls its hook with a bucket of gradients as soon as backward has filled it, bucket 0 first, and waits at the end of
backward for the futures that the hook has returned. A DDP bucket is cut into hvdtrain's (`exchange.buckets`), each of
one codec. On a CPU three threads work on these:

    backward         encode, start the first collective             returns the future
    second rounds    the first has arrived: start the second        in the order of buckets, over a group of its own
    finish           all has arrived: decode into DDP's bucket      completes the future

So every process group has the same order of collectives on all ranks (`comm/torch_group.py`). On a CUDA device all of
it is enqueued at once on a stream of its own, and no thread waits.

What a reducer keeps for the next step is committed when that begins: if any sum of a step is not finite, nothing of the
step is kept. DDP makes other buckets after its first step: what is kept goes by the names of parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hvdtrain.comm.torch_group import TorchGroup
from hvdtrain.compression.spec import Spec
from hvdtrain.exchange.buckets import Bucket, ExchangeConfig, real_numel
from hvdtrain.exchange.layout import BucketLayout
from hvdtrain.exchange.parameter_checks import check_parameters
from hvdtrain.exchange.partition import NamedParameters
from hvdtrain.exchange.state import (
    ExchangeState,
    gather_exchange_state,
    load_codec_state,
    load_local_share,
    local_exchange_state,
    scale_state,
)
from hvdtrain.system.errors import UserError


class DdpExchange(BucketLayout):
    """The sums of one DDP model's gradients over its process group.

    Attributes:
        loss_scale: what the gradients, and so all residuals, are multiplied with.
    """

    def __init__(self, model: DistributedDataParallel, spec: Spec, seed: int) -> None:
        """Prepare, on all ranks of the model's process group; buckets are made when DDP brings its own."""
        self.model = model
        # In the order of DDP's record of used parameters.
        self.trained, sparse = model._build_params_for_reducer()  # type: ignore[no-untyped-call]
        names = {p: name for name, p in model.module.named_parameters()}
        check_ddp_model(model, [names[p] for p, is_sparse in zip(self.trained, sparse, strict=True) if is_sparse])
        named = [(names[p], p) for p in self.trained]
        check_parameters(named, spec)
        check_complex(named)
        devices = {p.device for p in self.trained}
        if len(devices) > 1:
            raise UserError(f"the model is on {', '.join(sorted(map(str, devices)))}; expected one device")
        (self.device,) = devices
        group = TorchGroup(model.process_group, self.device)
        super().__init__(ExchangeConfig(average=True, spec=spec, seed=seed, group=group))
        self.names = {p: name for name, p in named}
        self.loss_scale = 1.0
        self._by_ddp_bucket: list[list[Bucket]] = []
        self._unplaced = ExchangeState()  # what buckets that are made take over, each rank its part
        self._unplaced_ranks = 1  # that have it together
        self._step_is_complete = False
        self._finds_unused = model.find_unused_parameters and not model.static_graph
        if self._finds_unused:  # DDP locks what it knows of them while it calls its hook
            model.register_forward_pre_hook(lambda *_: self.commit_step())
        self._second_rounds = ThreadPoolExecutor(1, "hvdtrain-second-rounds")
        self._finishes = ThreadPoolExecutor(1, "hvdtrain-finish")
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def wire_bytes(self) -> int:
        """Bytes that this rank sent in the last step."""
        return sum(bucket.reducer.wire_bytes for bucket in self.buckets)

    def start_reduction(self, ddp_bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
        """Start the mean of a DDP bucket over ranks; the future is complete when the bucket holds it."""
        if ddp_bucket.index() == 0:
            check_join(self.model)
            if self._step_is_complete and self._finds_unused:
                raise UserError(
                    "ddp_hook with find_unused_parameters=True needs a forward pass before each backward pass, on all "
                    "ranks: do not join ranks, or leave find_unused_parameters out"
                )
            self.commit_step()
        gradients = dict(zip(ddp_bucket.parameters(), ddp_bucket.gradients(), strict=True))
        buffer = ddp_bucket.buffer()
        future: torch.futures.Future[torch.Tensor]
        with self.on_stream():
            buckets = self._find_buckets(ddp_bucket.index(), list(gradients))
            for bucket in buckets:
                for index, p in enumerate(bucket.params):
                    bucket.put_gradient(index, gradients[p], self.steps)
                bucket.start_reduction(self.steps)
            if self._stream is None:
                future = torch.futures.Future()
                started = self._second_rounds.submit(start_second_rounds, buckets)
                self._finishes.submit(finish_reductions, buckets, gradients, started, future, buffer)
            else:
                future = torch.futures.Future(devices=[self.device])
                start_second_rounds(buckets)
                finish_reductions(buckets, gradients, None, future, buffer)
        self._step_is_complete = ddp_bucket.is_last()
        return future

    def commit_step(self) -> None:
        """Take over what the last step keeps, if that was not done and all its sums are finite."""
        if not self._step_is_complete:
            return
        self._step_is_complete = False
        used = dict(zip(self.trained, self._count_uses(), strict=True))
        with self.on_stream():
            if all(bucket.reducer.sum_is_finite() for bucket in self.buckets):
                for bucket in self.buckets:
                    bucket.commit_step([used[p] for p in bucket.params])
        self.steps += 1
        self._unplaced = ExchangeState()

    def _count_uses(self) -> Sequence[float]:
        """Return on how many ranks each parameter was used in the last step; DDP leaves gradients of unused alone."""
        if self._finds_unused:
            used: list[float] = self.model.reducer._get_local_used_map().tolist()
            return used
        return [self.size] * len(self.trained)

    def _find_buckets(self, number: int, params: Sequence[torch.nn.Parameter]) -> list[Bucket]:
        """Return the buckets of a DDP bucket; new ones if it holds other parameters than before."""
        if number < len(self._by_ddp_bucket):
            buckets = self._by_ddp_bucket[number]
            if {p for bucket in buckets for p in bucket.params} == set(params):
                return buckets
            self._forget_buckets(number)
        made = self.build_buckets([self.names[p] for p in params])
        for bucket in made:
            load_local_share(bucket, self._unplaced, self._unplaced_ranks)
            load_codec_state(bucket, self._unplaced)
        self._by_ddp_bucket.append(made)
        return made

    def _forget_buckets(self, first: int) -> None:
        """Drop the buckets of DDP's from a number on; those that are made next take over what they have not sent."""
        kept = [bucket for buckets in self._by_ddp_bucket[:first] for bucket in buckets]
        self.buckets = self.buckets[len(kept) :]
        self._unplaced, self._unplaced_ranks = local_exchange_state(self), 1
        self.buckets = kept
        del self._by_ddp_bucket[first:]

    def gather_state(self) -> ExchangeState:
        """Return the state, the same on all ranks, all of which call this between two steps."""
        self.commit_step()
        if not self.buckets:
            return self._unplaced
        with self.on_stream():
            state = gather_exchange_state(self, exact=False)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        return state

    def load_state(self, state: ExchangeState) -> None:
        """Take over a state, which is divided among the ranks. Raises UserError if it is of another model."""
        sizes = {name: real_numel(p) for p, name in self.names.items()}
        for name, part in (state.unsent | state.velocities).items():
            if sizes.get(name) != len(part):
                raise UserError(
                    f"the state of ddp_hook has {len(part)} values of {name}, of which this model trains "
                    f"{sizes.get(name, 0)}; expected the state of the same model"
                )
        self.steps, self.buckets, self._by_ddp_bucket, self.build_orders = state.steps, [], [], []
        self._unplaced, self._unplaced_ranks = state, self.size
        self._step_is_complete = False

    def set_loss_scale(self, scale: float) -> None:
        """Bring what is kept to a new loss scale."""
        if scale != self.loss_scale:
            self.commit_step()
            with self.on_stream():
                scale_state(self, scale / self.loss_scale)
            self.loss_scale = scale

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Enqueue what a CUDA device does in here after what the current stream has now, next to what it gets later."""
        with torch.no_grad():
            if self._stream is None:
                yield
                return
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                yield


def check_ddp_model(model: DistributedDataParallel, sparse: Sequence[str]) -> None:
    """Raise UserError for what the hook cannot do. sparse: names of the parameters whose gradients are sparse."""
    if sparse:
        raise UserError(
            f"ddp_hook takes no sparse gradients, as {sparse[0]} has: make its embedding with sparse=False, or train "
            "with hvdtrain.torch.DistributedOptimizer"
        )
    if model.mixed_precision is not None:
        raise UserError(
            "ddp_hook takes no DistributedDataParallel(mixed_precision=...): use torch.autocast, or a model whose "
            "parameters are bfloat16 or float16"
        )


def check_complex(named: NamedParameters) -> None:
    """Raise UserError for a complex parameter: DDP does not give its gradient to a hook as it is."""
    for name, p in named:
        if p.is_complex():
            raise UserError(
                f"ddp_hook takes no complex parameters, as {name} is: train with hvdtrain.torch.DistributedOptimizer"
            )


def check_join(model: DistributedDataParallel) -> None:
    """Raise UserError if the mean is to be over the ranks that have not joined yet."""
    if model._join_config.enable and not model._divide_by_initial_world_size:
        raise UserError("ddp_hook takes the mean over all ranks: call join(divide_by_initial_world_size=True)")


def start_second_rounds(buckets: Sequence[Bucket]) -> None:
    """Start the second collectives of buckets, when their first ones have arrived."""
    for bucket in buckets:
        bucket.reducer.start_second_round()


def finish_reductions(
    buckets: Sequence[Bucket],
    gradients: Mapping[torch.nn.Parameter, torch.Tensor],
    started: ThreadFuture[None] | None,
    future: torch.futures.Future[torch.Tensor],
    buffer: torch.Tensor,
) -> None:
    """Decode the means into DDP's gradients, views of its buffer, and complete the future with that, or an error.

    Args:
        buckets: of the gradients.
        gradients: by parameter, overwritten.
        started: complete when all second rounds are started; None: they are.
        future: what DDP waits for.
        buffer: of DDP's bucket.
    """
    try:
        if started is not None:
            started.result()
        with torch.no_grad():
            for bucket in buckets:
                bucket.reducer.finish_reduction()
                for p, view in zip(bucket.params, bucket.views, strict=True):
                    gradients[p].copy_(view)
        future.set_result(buffer)
    except Exception as error:  # another rank is gone, say: DDP raises it at the end of backward
        future.set_exception(error)  # type: ignore[arg-type]
