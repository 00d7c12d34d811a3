"""`--compression auto`: measures, predicts, tries, and watches; rank 0 decides for all, for each bucket.

    all buckets plain --> measure network and codecs, predict each choice --> try the best few in turns
                      --> take the fastest --> look from time to time whether it still is faster than none

The model of a step (`hvdtrain.compression.cost_model`) only chooses what is worth trying; the choice is what was
fastest in steps of the training itself. Nothing is lost when a bucket's method changes: what a method has not sent yet,
the next one sends.

It is in this room because it changes buckets; the cost model, which knows only reducers, is with the codecs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from hvdtrain.comm import collectives, network_model
from hvdtrain.comm.network_model import NetworkModel
from hvdtrain.compression import cost_model
from hvdtrain.compression.codec import RandomKey
from hvdtrain.compression.cost_model import BucketCost
from hvdtrain.compression.registry import auto_candidates
from hvdtrain.compression.spec import NONE, Spec, parse_compression
from hvdtrain.exchange.advice import Advice, Choice, ChoiceReport, explain_choice, format_advice, format_choice
from hvdtrain.exchange.buckets import Bucket, ExchangeConfig, make_reducer, set_compression

SETTLE_STEPS = 3  # steps after a change that are not measured
TRIAL_STEPS = 6  # steps measured of each choice in a round
# After each round but the last, what took longer than this times the best is out; what is close is measured on.
TRIAL_MARGINS = (1.5, 1.2, 1.1, 1.1)
WATCH_STEPS = 100  # steps between checks whether the choice is still faster; twice as many after each false alarm
MAX_SLOWDOWN = 1.02  # a choice slower than none by more is checked
MAX_TRIALS = 3  # choices tried, apart from none
MAX_PREDICTED_RATIO = 1.15  # what is predicted to take longer than this times none's step is not tried
MAX_MEASURED_RATIO = 0.96  # a choice is taken only if its steps take no more than this times none's
T = TypeVar("T")


class AdvisedExchange(Protocol):
    """What the advisor needs of an exchange."""

    config: ExchangeConfig
    buckets: list[Bucket]
    steps: int
    backward_end: float


@dataclass(frozen=True)
class Forecast:
    """What a step takes with each choice, predicted from measured parts; the same on all ranks."""

    ready: list[float]  # when each bucket has all its gradients, in seconds from a step's start
    end: float  # when the backward pass is over
    network: NetworkModel
    plain_costs: list[BucketCost]  # of all buckets, without compression
    method_costs: dict[tuple[int, str], BucketCost]  # by a compressible bucket's number and method
    compressible: list[int]  # numbers of buckets

    def costs_of(self, choice: Choice) -> list[BucketCost]:
        """Return the costs of the compressible buckets."""
        return [self.method_costs[number, method] for number, method in zip(self.compressible, choice, strict=True)]

    def predict_seconds(self, choice: Choice) -> float:
        """Predict forward pass, backward pass and exchange."""
        costs = list(self.plain_costs)
        for number, cost in zip(self.compressible, self.costs_of(choice), strict=True):
            costs[number] = cost
        return cost_model.predict_step_time(self.ready, self.end, costs, self.network)


class Advisor:
    """Follows an exchange step by step: `advance_trials` is called at the end of each, on all ranks.

    Attributes:
        exchange: whose buckets' methods it sets.
        methods: what a bucket may have, "none" first.
        log_line: called with each line of its report.
        advice: what was chosen; None before that.
    """

    def __init__(self, exchange: AdvisedExchange) -> None:
        self.exchange = exchange
        self.group = exchange.config.group
        self.methods = (NONE, *auto_candidates())
        self.log_line: Callable[[str], object] = print if collectives.rank(self.group) == 0 else lambda line: None
        self.advice: Advice | None = None
        self._trials: Generator[None, None, None] | None = self._run_trials()
        self._step_start = time.perf_counter()
        self._step_seconds: list[float] = []  # of the steps of this trial
        # When each bucket was full, and the backward pass over, from a step's start.
        self._ready_times: list[list[float]] = []

    def restart_trials(self) -> None:
        """Measure again: the exchange has other buckets."""
        self._trials = self._run_trials()

    def advance_trials(self) -> None:
        """Take note of a step's times, and go to the next step of the trials."""
        if self._trials is None:
            return
        self._step_seconds.append(time.perf_counter() - self._step_start)
        moments = [*(bucket.ready_time for bucket in self.exchange.buckets), self.exchange.backward_end]
        self._ready_times.append([moment - self._step_start for moment in moments])
        try:
            next(self._trials)
        except StopIteration:  # nothing is left to watch
            self._trials = None
        self._step_start = time.perf_counter()

    @property
    def _compressible_indices(self) -> list[int]:
        """The numbers of the buckets that may have a method."""
        return [i for i, bucket in enumerate(self.exchange.buckets) if bucket.compressible]

    @property
    def _all_none(self) -> Choice:
        return (NONE,) * len(self._compressible_indices)

    def _broadcast_value(self, value: T) -> T:
        """Return rank 0's value."""
        return collectives.gather_json(value, "advisor.agree", self.group)[0]  # type: ignore[no-any-return]

    def _time_steps(self, count: int, skip: int = SETTLE_STEPS) -> Generator[None, None, list[float]]:
        """Let skip + count steps pass; return the seconds of the last `count`, rank 0's on all ranks."""
        self._step_seconds, self._ready_times = [], []
        for _ in range(skip + count):
            yield
        return self._broadcast_value(self._step_seconds[skip:])

    def _run_trials(self) -> Generator[None, None, None]:
        """Measure, choose and watch; each `yield` is a step of the training."""
        exchange = self.exchange
        self._apply_choice(self._all_none)
        # This step made buckets; a warm-up is plain.
        while exchange.steps < exchange.config.spec.warmup:
            yield
        compressible, none = self._compressible_indices, self._all_none
        if not compressible:
            self.log_line("advisor   none: no parameter is large enough to be worth compressing")
            return
        plain = yield from self._time_steps(TRIAL_STEPS)
        forecast = self._measure_costs()
        # What the model leaves out (the update, loading) is the same for all.
        rest = statistics.median(plain) - forecast.predict_seconds(none)
        shortlist = shortlist_choices(forecast.predict_seconds, self.methods, len(compressible))
        predicted = {choice: forecast.predict_seconds(choice) + rest for choice in shortlist}
        limit = MAX_PREDICTED_RATIO * statistics.median(plain)
        hopeful = [choice for choice in predicted if choice != none and predicted[choice] < limit][:MAX_TRIALS]
        seconds: dict[Choice, list[float]] = {choice: [] for choice in hopeful} | {none: plain}
        chosen = yield from self._compare_choices(seconds)
        self._apply_choice(chosen)
        self._report_choice(forecast, predicted, seconds, chosen)
        yield from self._watch_choice(chosen, statistics.median(seconds[none]))

    def _measure_costs(self) -> Forecast:
        """Measure the network and each method for each bucket, after plain steps."""
        exchange = self.exchange
        columns = zip(*self._ready_times[SETTLE_STEPS:], strict=True)
        *ready, end = self._broadcast_value([statistics.median(column) for column in columns])
        device = exchange.buckets[0].reducer.flat.device
        network = network_model.measure_network("advisor.network", self.group, device)
        plain = [cost_of_method(exchange, number, NONE) for number in range(len(exchange.buckets))]
        costs = {
            (number, method): cost_of_method(exchange, number, method, repeats=2)
            for number in self._compressible_indices
            for method in self.methods
        }
        return Forecast(ready, end, network, plain, costs, self._compressible_indices)

    def _compare_choices(self, seconds: dict[Choice, list[float]]) -> Generator[None, None, Choice]:
        """Train with each choice in turns, leaving out the slow ones after each round; return the one to take.

        The turns are short, so that a machine or network whose speed drifts favours none of them.

        Args:
            seconds: of the steps measured of each choice, to which more are added; "none" has been measured once.
        """
        none = self._all_none
        measured: dict[Choice, float] = {}
        left = list(seconds)
        for margin in (*TRIAL_MARGINS, 1.0):
            for choice in left if len(left) > 1 else ():
                if not measured and choice == none:
                    continue  # just measured
                self._apply_choice(choice)
                seconds[choice] += yield from self._time_steps(TRIAL_STEPS)
            measured = {choice: statistics.median(values) for choice, values in seconds.items()}
            best = min(measured[choice] for choice in left)
            left = [choice for choice in left if measured[choice] <= margin * best]
        return left[0] if measured[left[0]] <= MAX_MEASURED_RATIO * measured[none] else none

    def _watch_choice(
        self, chosen: Choice, baseline: float, interval: int = WATCH_STEPS
    ) -> Generator[None, None, None]:
        """Go back to none, once, if the choice has become slower than none is now.

        Args:
            chosen: the choice.
            baseline: seconds of a step with none.
            interval: steps until the first check.
        """
        none = self._all_none
        while chosen != none:
            seconds = statistics.median((yield from self._time_steps(interval, skip=0)))
            if seconds <= MAX_SLOWDOWN * baseline:
                continue
            interval *= 2
            self._apply_choice(none)
            baseline = statistics.median((yield from self._time_steps(TRIAL_STEPS)))
            if baseline < seconds:
                self.log_line(
                    f"advisor   back to none: {format_choice(chosen)} now takes {seconds * 1e3:.4g} ms a step, "
                    f"none {baseline * 1e3:.4g} ms"
                )
                assert self.advice is not None
                self.advice = replace(self.advice, chosen=list(none), went_back_at_step=self.exchange.steps)
                return
            self._apply_choice(chosen)

    def _apply_choice(self, choice: Choice) -> None:
        for number, method in zip(self._compressible_indices, choice, strict=True):
            bucket = self.exchange.buckets[number]
            if bucket.method != method:
                set_compression(bucket, *_reducer_options(self.exchange, number, method))

    def _report_choice(
        self,
        forecast: Forecast,
        predicted: dict[Choice, float],
        seconds: dict[Choice, list[float]],
        chosen: Choice,
    ) -> None:
        """Set `advice`, and log it as a table.

        Args:
            forecast: what was measured of network and methods.
            predicted: seconds of a step, by choice.
            seconds: of the steps measured of each choice that was tried.
            chosen: one of them.
        """
        measured = {choice: statistics.median(values) for choice, values in seconds.items()}
        rows: list[ChoiceReport] = []
        for choice in sorted(predicted, key=lambda choice: measured.get(choice, predicted[choice])):
            costs = forecast.costs_of(choice)
            rows.append(
                ChoiceReport(
                    choice=list(choice),
                    wire_bytes=sum(cost.wire_bytes for cost in costs),
                    encode_seconds=sum(cost.encode_seconds for cost in costs),
                    decode_seconds=sum(cost.decode_seconds for cost in costs),
                    predicted_step_seconds=predicted[choice],
                    measured_step_seconds=measured.get(choice),
                    measured_steps=len(seconds.get(choice, [])),
                )
            )
        reason = explain_choice(chosen, self._all_none, measured)
        self.advice = Advice(forecast.network, rows, list(chosen), reason, self.exchange.steps)
        for line in format_advice(self.advice):
            self.log_line(line)


def cost_of_method(exchange: AdvisedExchange, number: int, method: str, repeats: int = 3) -> BucketCost:
    """Return what a method costs for a bucket in each step: measured outside training, on all ranks; none is computed.

    Args:
        exchange: of the bucket.
        number: of the bucket.
        method: such as "powersgd:4".
        repeats: steps that count.
    """
    bucket = exchange.buckets[number]
    if method == NONE:
        return BucketCost(NONE, 0.0, 0.0, bucket.reducer.wire_bytes, 1)
    flat = torch.empty_like(bucket.reducer.flat)
    reducer = make_reducer(bucket, flat, *_reducer_options(exchange, number, method))
    return cost_model.measure_cost(reducer, method, repeats)


def _reducer_options(exchange: AdvisedExchange, number: int, method: str) -> tuple[Spec, str, RandomKey]:
    """Return spec, argument and key of a method for a bucket, with the exchange's own options."""
    config = exchange.config
    spec = parse_compression(method)
    spec = replace(spec, feedback=config.spec.feedback, momentum=config.spec.momentum, warmup=0)
    return spec, spec.argument, RandomKey(config.seed, 0, number, collectives.rank(config.group))


def shortlist_choices(predict: Callable[[Choice], float], methods: Sequence[str], buckets: int) -> list[Choice]:
    """Return choices worth a look, the fastest first: the best mixture, and one method for all buckets.

    Args:
        predict: seconds of a step, by choice.
        methods: what a bucket may have.
        buckets: how many there are.
    """
    choices = sorted(((method,) * buckets for method in methods), key=predict)
    best = choices[0]
    better = True
    while better:  # one bucket's method at a time, as long as it helps
        better = False
        for number in range(buckets):
            for method in methods:
                candidate = (*best[:number], method, *best[number + 1 :])
                if predict(candidate) < predict(best) * (1 - 1e-6):
                    best, better = candidate, True
    return [best, *(choice for choice in choices if choice != best)]
