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
from hvdtrain.compression.codec import Key
from hvdtrain.compression.cost_model import Cost
from hvdtrain.compression.spec import Spec, parse
from hvdtrain.exchange.buckets import choose, make_channel

if TYPE_CHECKING:
    from hvdtrain.exchange.bucketed import Exchange

CANDIDATES = ("fp16", "int8", "onebit", "topk:0.01", "powersgd:4")
METHODS = ("none", *CANDIDATES)
SETTLE = 3  # steps after a change that are not measured
TRIAL = 6  # steps measured of each choice in a round
# After each round but the last, what took longer than this times the best is out: who is far behind costs no more,
# and who is close is looked at until noise has evened out.
MARGINS = (1.5, 1.2, 1.1, 1.1)
WATCH = 100  # steps between looks at whether the choice still pays; twice as many after each that was in vain
SLOWER = 1.02  # than none, and it is time to look
TRIED = 3  # choices tried at most, besides none
HOPEFUL = 1.15  # what is predicted to take longer than this times none's step is not tried
GAIN = 0.96  # of none's step seconds that a choice must not exceed to be taken
Choice = tuple[str, ...]  # a method for each bucket that may have one
T = TypeVar("T")


class Advisor:
    """Follows an exchange step by step; `after_step` is called at the end of each, on all ranks."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.tell: Callable[[str], object] = print if collectives.rank(exchange.group) == 0 else lambda line: None
        self.advice: dict[str, Any] | None = None
        self._course: Generator[None, None, None] | None = self._run()
        self._begun = time.perf_counter()
        self._seconds: list[float] = []  # of the steps of this trial
        # When each bucket was full, and the backward pass over, from a step's begin.
        self._ready: list[list[float]] = []

    def restart(self) -> None:
        """Measure anew: the exchange has other buckets."""
        self._course = self._run()

    def after_step(self) -> None:
        if self._course is None:
            return
        self._seconds.append(time.perf_counter() - self._begun)
        moments = [*(bucket.ready for bucket in self.exchange.buckets), self.exchange.backward_end]
        self._ready.append([moment - self._begun for moment in moments])
        try:
            next(self._course)
        except StopIteration:  # nothing is left to watch
            self._course = None
        self._begun = time.perf_counter()

    @property
    def _places(self) -> list[int]:
        """Of the buckets that may have a method."""
        return [i for i, bucket in enumerate(self.exchange.buckets) if bucket.coded]

    @property
    def _none(self) -> Choice:
        return ("none",) * len(self._places)

    def _agree(self, value: T) -> T:
        """Rank 0's value."""
        return collectives.gather_json(value, "advisor.agree", self.exchange.group)[0]  # type: ignore[no-any-return]

    def _steps(self, count: int, skip: int = SETTLE) -> Generator[None, None, list[float]]:
        """Let so many steps pass; the seconds of those that count, rank 0's on all ranks."""
        self._seconds, self._ready = [], []
        for _ in range(skip + count):
            yield
        return self._agree(self._seconds[skip:])

    def _run(self) -> Generator[None, None, None]:
        exchange = self.exchange
        self._assign(self._none)
        # This step made buckets; a warm-up is plain.
        while exchange.steps < exchange.spec.warmup:
            yield
        places, none = self._places, self._none
        if not places:
            self.tell("advisor   none: no parameter is large enough to be worth compressing")
            return
        plain = yield from self._steps(TRIAL)
        *ready, end = self._agree([statistics.median(column) for column in zip(*self._ready[SETTLE:], strict=True)])
        network = network_model.fit("advisor.network", exchange.group, exchange.buckets[0].channel.flat.device)
        fixed = [cost_of(exchange, place, "none") for place in range(len(exchange.buckets))]
        costs = {(place, method): cost_of(exchange, place, method, repeats=2) for place in places for method in METHODS}

        def modelled(choice: Choice) -> float:
            chosen = list(fixed)
            for place, method in zip(places, choice, strict=True):
                chosen[place] = costs[place, method]
            return cost_model.step_seconds(ready, end, chosen, network)

        # What the model leaves out (the update, loading) is the same for all.
        rest = statistics.median(plain) - modelled(none)
        predicted = {choice: modelled(choice) + rest for choice in shortlist(modelled, len(places))}
        hopeful = [c for c in predicted if c != none and predicted[c] < HOPEFUL * statistics.median(plain)][:TRIED]
        seconds: dict[Choice, list[float]] = {choice: [] for choice in hopeful} | {none: plain}
        measured: dict[Choice, float] = {}
        left = [*hopeful, none]
        # In turns, so that a machine or network that drifts favours none of them.
        for margin in (*MARGINS, 1.0):
            for choice in left if len(left) > 1 else ():
                if not measured and choice == none:
                    continue  # just measured
                self._assign(choice)
                seconds[choice] += yield from self._steps(TRIAL)
            measured = {choice: statistics.median(values) for choice, values in seconds.items()}
            best = min(measured[choice] for choice in left)
            left = [choice for choice in left if measured[choice] <= margin * best]
        chosen = left[0]
        if measured[chosen] > GAIN * measured[none]:
            chosen = none
        self._assign(chosen)
        self._report(network, costs, predicted, seconds, chosen)
        yield from self._watch(chosen, measured[none])

    def _watch(self, chosen: Choice, baseline: float, interval: int = WATCH) -> Generator[None, None, None]:
        """Go back to none, once, if the choice has become slower than none is now.

        interval: steps until the first look.
        """
        assert self.advice is not None
        none = self._none
        while chosen != none:
            seconds = statistics.median((yield from self._steps(interval, skip=0)))
            if seconds <= SLOWER * baseline:
                continue
            interval *= 2
            self._assign(none)
            baseline = statistics.median((yield from self._steps(TRIAL)))
            if baseline < seconds:
                self.tell(
                    f"advisor   back to none: {shown(chosen)} has come to {seconds * 1e3:.4g} ms a step, "
                    f"none takes {baseline * 1e3:.4g} ms"
                )
                self.advice |= {"chosen": list(none), "went_back_at_step": self.exchange.steps}
                return
            self._assign(chosen)

    def _assign(self, choice: Choice) -> None:
        for place, method in zip(self._places, choice, strict=True):
            bucket = self.exchange.buckets[place]
            if bucket.method != method:
                choose(bucket, *_way(self.exchange, place, method))

    def _report(
        self,
        network: network_model.Network,
        costs: dict[tuple[int, str], Cost],
        predicted: dict[Choice, float],
        seconds: dict[Choice, list[float]],
        chosen: Choice,
    ) -> None:
        """Set `advice`, and tell it in a table. seconds: of the steps measured of each choice."""
        none = self._none
        measured = {choice: statistics.median(values) for choice, values in seconds.items()}
        rows: list[dict[str, Any]] = []
        for choice in sorted(predicted, key=lambda choice: measured.get(choice, predicted[choice])):
            parts = [costs[place, method] for place, method in zip(self._places, choice, strict=True)]
            rows.append(
                {
                    "choice": list(choice),
                    "wire_bytes": sum(part.wire_bytes for part in parts),
                    "encode_seconds": sum(part.encode for part in parts),
                    "decode_seconds": sum(part.decode for part in parts),
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
            reason = f"the best other, {shown(best)}, takes {others[best] / measured[none]:.2f} of its time, measured"
        else:
            reason = "every other is predicted to take longer"
        self.advice = {
            "network": {"latency_seconds": network.latency, "bytes_per_second": network.bandwidth},
            "rows": rows,
            "chosen": list(chosen),
            "reason": reason,
            "at_step": self.exchange.steps,
        }
        self.tell(
            f"advisor   network {network.bandwidth * 8 / 1e9:.3g} Gbit/s, {network.latency * 1e3:.2g} ms a collective"
        )
        self.tell("          method           wire MB  encode ms  decode ms  predicted ms  measured ms")
        for row in rows:
            columns = [row[name] * 1e3 for name in ("encode_seconds", "decode_seconds", "predicted_step_seconds")]
            shares = f"{columns[0]:9.1f}  {columns[1]:9.1f}  {columns[2]:12.1f}"
            step = row["measured_step_seconds"]
            measured_ms = f"{step * 1e3:11.1f}" if step else "          -"
            self.tell(f"          {shown(row['choice']):16} {row['wire_bytes'] / 1e6:7.2f}  {shares}  {measured_ms}")
        self.tell(f"advisor   takes {shown(chosen)}: {reason}")


def cost_of(exchange: Exchange, place: int, method: str, repeats: int = 3) -> Cost:
    """What a method costs for a bucket in each step: measured apart from training, on all ranks, none reckoned."""
    bucket = exchange.buckets[place]
    if method == "none":
        return Cost("none", 0.0, 0.0, bucket.channel.wire_bytes, 1)
    channel = make_channel(bucket, torch.empty_like(bucket.channel.flat), *_way(exchange, place, method))
    return cost_model.measure(channel, method, repeats)


def _way(exchange: Exchange, place: int, method: str) -> tuple[Spec, str, Key]:
    """A method for a bucket, with the exchange's own options: spec, argument and key."""
    spec = replace(parse(method), feedback=exchange.spec.feedback, momentum=exchange.spec.momentum, warmup=0)
    return spec, spec.argument, Key(exchange.seed, 0, place, collectives.rank(exchange.group))


def shortlist(modelled: Callable[[Choice], float], buckets: int) -> list[Choice]:
    """Choices worth a look, the fastest by the model first: one method for all buckets, and the best mixture."""
    choices = sorted(((method,) * buckets for method in METHODS), key=modelled)
    best = choices[0]
    better = True
    while better:  # one bucket's method at a time, as long as it helps
        better = False
        for place in range(buckets):
            for method in METHODS:
                candidate = (*best[:place], method, *best[place + 1 :])
                if modelled(candidate) < modelled(best) * (1 - 1e-6):
                    best, better = candidate, True
    return [best, *(choice for choice in choices if choice != best)]


def shown(choice: Sequence[str]) -> str:
    """A choice for people: a method, or methods with their numbers of buckets."""
    counts = {method: choice.count(method) for method in dict.fromkeys(choice)}
    return next(iter(counts)) if len(counts) == 1 else "+".join(f"{n}x{method}" for method, n in counts.items())
