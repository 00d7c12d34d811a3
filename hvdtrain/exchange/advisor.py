"""`--compression auto`: measures, predicts, tries out, and watches; rank 0 decides, for each bucket, none included.

The model of a step (`hvdtrain.compression.cost_model`) only chooses what is worth trying; what is taken is what was
fastest in steps of the training itself. Nothing is lost on the way: what a method has not sent yet, the next one sends.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hvdtrain.comm import collectives, network_model
from hvdtrain.compression import cost_model
from hvdtrain.compression.codec import RandomKey
from hvdtrain.compression.cost_model import BucketCost
from hvdtrain.compression.spec import Spec, parse_compression
from hvdtrain.exchange.buckets import make_reducer, set_compression

if TYPE_CHECKING:
    from hvdtrain.exchange.bucketed import BucketedExchange

CANDIDATES = ("fp16", "int8", "onebit", "topk:0.01", "powersgd:4")
ADVISED_METHODS = ("none", *CANDIDATES)
SETTLE_STEPS = 3  # steps after a change that are not measured
TRIAL_STEPS = 6  # steps measured of each choice in a round
# After each round but the last, what took longer than this times the best is out: who is far behind costs no more,
# and who is close is looked at until noise has evened out.
TRIAL_MARGINS = (1.5, 1.2, 1.1, 1.1)
WATCH_STEPS = 100  # steps between looks at whether the choice still pays; twice as many after each that was in vain
MAX_SLOWDOWN = 1.02  # than none, and it is time to look
MAX_TRIALS = 3  # choices tried at most, besides none
MAX_PREDICTED_RATIO = 1.15  # what is predicted to take longer than this times none's step is not tried
MAX_MEASURED_RATIO = 0.96  # of none's step seconds that a choice must not exceed to be taken
Choice = tuple[str, ...]  # a method for each bucket that may have one
T = TypeVar("T")


class Advisor:
    """Follows an exchange step by step; `after_step` is called at the end of each, on all ranks."""

    def __init__(self, exchange: BucketedExchange) -> None:
        self.exchange = exchange
        self.log_line: Callable[[str], object] = print if collectives.rank(exchange.group) == 0 else lambda line: None
        self.advice: dict[str, Any] | None = None
        self._trials: Generator[None, None, None] | None = self._run_trials()
        self._step_start = time.perf_counter()
        self._step_seconds: list[float] = []  # of the steps of this trial
        # When each bucket was full, and the backward pass over, from a step's begin.
        self._ready_times: list[list[float]] = []

    def restart_trials(self) -> None:
        """Measure anew: the exchange has other buckets."""
        self._trials = self._run_trials()

    def advance_trials(self) -> None:
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
        """Of the buckets that may have a method."""
        return [i for i, bucket in enumerate(self.exchange.buckets) if bucket.compressible]

    @property
    def _all_none(self) -> Choice:
        return ("none",) * len(self._compressible_indices)

    def _broadcast_value(self, value: T) -> T:
        """Rank 0's value."""
        return collectives.gather_json(value, "advisor.agree", self.exchange.group)[0]  # type: ignore[no-any-return]

    def _time_steps(self, count: int, skip: int = SETTLE_STEPS) -> Generator[None, None, list[float]]:
        """Let so many steps pass; the seconds of those that count, rank 0's on all ranks."""
        self._step_seconds, self._ready_times = [], []
        for _ in range(skip + count):
            yield
        return self._broadcast_value(self._step_seconds[skip:])

    def _run_trials(self) -> Generator[None, None, None]:
        exchange = self.exchange
        self._apply_choice(self._all_none)
        # This step made buckets; a warm-up is plain.
        while exchange.steps < exchange.spec.warmup:
            yield
        places, none = self._compressible_indices, self._all_none
        if not places:
            self.log_line("advisor   none: no parameter is large enough to be worth compressing")
            return
        plain = yield from self._time_steps(TRIAL_STEPS)
        *ready, end = self._broadcast_value(
            [statistics.median(column) for column in zip(*self._ready_times[SETTLE_STEPS:], strict=True)]
        )
        network = network_model.measure_network(
            "advisor.network", exchange.group, exchange.buckets[0].reducer.flat.device
        )
        fixed = [cost_of_method(exchange, place, "none") for place in range(len(exchange.buckets))]
        costs = {
            (place, method): cost_of_method(exchange, place, method, repeats=2)
            for place in places
            for method in ADVISED_METHODS
        }

        def predict_choice_seconds(choice: Choice) -> float:
            chosen = list(fixed)
            for place, method in zip(places, choice, strict=True):
                chosen[place] = costs[place, method]
            return cost_model.predict_step_time(ready, end, chosen, network)

        # What the model leaves out (the update, loading) is the same for all.
        rest = statistics.median(plain) - predict_choice_seconds(none)
        predicted = {
            choice: predict_choice_seconds(choice) + rest
            for choice in shortlist_choices(predict_choice_seconds, len(places))
        }
        hopeful = [c for c in predicted if c != none and predicted[c] < MAX_PREDICTED_RATIO * statistics.median(plain)][
            :MAX_TRIALS
        ]
        seconds: dict[Choice, list[float]] = {choice: [] for choice in hopeful} | {none: plain}
        measured: dict[Choice, float] = {}
        left = [*hopeful, none]
        # In turns, so that a machine or network that drifts favours none of them.
        for margin in (*TRIAL_MARGINS, 1.0):
            for choice in left if len(left) > 1 else ():
                if not measured and choice == none:
                    continue  # just measured
                self._apply_choice(choice)
                seconds[choice] += yield from self._time_steps(TRIAL_STEPS)
            measured = {choice: statistics.median(values) for choice, values in seconds.items()}
            best = min(measured[choice] for choice in left)
            left = [choice for choice in left if measured[choice] <= margin * best]
        chosen = left[0]
        if measured[chosen] > MAX_MEASURED_RATIO * measured[none]:
            chosen = none
        self._apply_choice(chosen)
        self._report_choice(network, costs, predicted, seconds, chosen)
        yield from self._watch_choice(chosen, measured[none])

    def _watch_choice(
        self, chosen: Choice, baseline: float, interval: int = WATCH_STEPS
    ) -> Generator[None, None, None]:
        """Go back to none, once, if the choice has become slower than none is now.

        interval: steps until the first look.
        """
        assert self.advice is not None
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
                    f"advisor   back to none: {format_choice(chosen)} has come to {seconds * 1e3:.4g} ms a step, "
                    f"none takes {baseline * 1e3:.4g} ms"
                )
                self.advice |= {"chosen": list(none), "went_back_at_step": self.exchange.steps}
                return
            self._apply_choice(chosen)

    def _apply_choice(self, choice: Choice) -> None:
        for place, method in zip(self._compressible_indices, choice, strict=True):
            bucket = self.exchange.buckets[place]
            if bucket.method != method:
                set_compression(bucket, *_reducer_options(self.exchange, place, method))

    def _report_choice(
        self,
        network: network_model.NetworkModel,
        costs: dict[tuple[int, str], BucketCost],
        predicted: dict[Choice, float],
        seconds: dict[Choice, list[float]],
        chosen: Choice,
    ) -> None:
        """Set `advice`, and tell it in a table. seconds: of the steps measured of each choice."""
        none = self._all_none
        measured = {choice: statistics.median(values) for choice, values in seconds.items()}
        rows: list[dict[str, Any]] = []
        for choice in sorted(predicted, key=lambda choice: measured.get(choice, predicted[choice])):
            parts = [costs[place, method] for place, method in zip(self._compressible_indices, choice, strict=True)]
            rows.append(
                {
                    "choice": list(choice),
                    "wire_bytes": sum(part.wire_bytes for part in parts),
                    "encode_seconds": sum(part.encode_seconds for part in parts),
                    "decode_seconds": sum(part.decode_seconds for part in parts),
                    "predicted_step_seconds": predicted[choice],
                    "measured_step_seconds": measured.get(choice),
                    "measured_steps": len(seconds.get(choice, [])),
                }
            )
        others = {choice: seconds for choice, seconds in measured.items() if choice != none}
        if chosen != none:
            reason = f"its steps take {measured[chosen] / measured[none]:.2f} of the time of none's, measured"
        elif others:
            best = min(others, key=lambda choice: others[choice])
            reason = (
                f"the best other, {format_choice(best)}, takes {others[best] / measured[none]:.2f} of its time, "
                f"measured"
            )
        else:
            reason = "every other is predicted to take longer"
        self.advice = {
            "network": {"latency_seconds": network.latency, "bytes_per_second": network.bandwidth},
            "rows": rows,
            "chosen": list(chosen),
            "reason": reason,
            "at_step": self.exchange.steps,
        }
        self.log_line(
            f"advisor   network {network.bandwidth * 8 / 1e9:.3g} Gbit/s, {network.latency * 1e3:.2g} ms a collective"
        )
        self.log_line("          method           wire MB  encode ms  decode ms  predicted ms  measured ms")
        for row in rows:
            columns = [row[name] * 1e3 for name in ("encode_seconds", "decode_seconds", "predicted_step_seconds")]
            shares = f"{columns[0]:9.1f}  {columns[1]:9.1f}  {columns[2]:12.1f}"
            step = row["measured_step_seconds"]
            measured_ms = f"{step * 1e3:11.1f}" if step else "          -"
            self.log_line(
                f"          {format_choice(row['choice']):16} {row['wire_bytes'] / 1e6:7.2f}  {shares}  {measured_ms}"
            )
        self.log_line(f"advisor   takes {format_choice(chosen)}: {reason}")


def cost_of_method(exchange: BucketedExchange, place: int, method: str, repeats: int = 3) -> BucketCost:
    """What a method costs for a bucket in each step: measured apart from training, on all ranks, none reckoned."""
    bucket = exchange.buckets[place]
    if method == "none":
        return BucketCost("none", 0.0, 0.0, bucket.reducer.wire_bytes, 1)
    channel = make_reducer(bucket, torch.empty_like(bucket.reducer.flat), *_reducer_options(exchange, place, method))
    return cost_model.measure_cost(channel, method, repeats)


def _reducer_options(exchange: BucketedExchange, place: int, method: str) -> tuple[Spec, str, RandomKey]:
    """A method for a bucket, with the exchange's own options: spec, argument and key."""
    spec = replace(
        parse_compression(method), feedback=exchange.spec.feedback, momentum=exchange.spec.momentum, warmup=0
    )
    return spec, spec.argument, RandomKey(exchange.seed, 0, place, collectives.rank(exchange.group))


def shortlist_choices(modelled: Callable[[Choice], float], buckets: int) -> list[Choice]:
    """Choices worth a look, the fastest by the model first: one method for all buckets, and the best mixture."""
    choices = sorted(((method,) * buckets for method in ADVISED_METHODS), key=modelled)
    best = choices[0]
    better = True
    while better:  # one bucket's method at a time, as long as it helps
        better = False
        for place in range(buckets):
            for method in ADVISED_METHODS:
                candidate = (*best[:place], method, *best[place + 1 :])
                if modelled(candidate) < modelled(best) * (1 - 1e-6):
                    best, better = candidate, True
    return [best, *(choice for choice in choices if choice != best)]


def format_choice(choice: Sequence[str]) -> str:
    """A choice for people: a method, or methods with their numbers of buckets."""
    counts = {method: choice.count(method) for method in dict.fromkeys(choice)}
    return next(iter(counts)) if len(counts) == 1 else "+".join(f"{n}x{method}" for method, n in counts.items())
