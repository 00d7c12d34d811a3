"""`--compression auto`: measures, predicts, tries out, and watches; rank 0 decides, for each bucket, none included.

The model of a step (`hvdtrain.compression.cost`) only chooses what is worth trying; what is taken is what was fastest
in steps of the training itself. Nothing is lost on the way: what a method has not sent yet, the next one sends.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from hvdtrain.collectives import ops, probe
from hvdtrain.compression import cost
from hvdtrain.compression.codec import Key
from hvdtrain.compression.cost import Cost
from hvdtrain.compression.spec import Spec, parse
from hvdtrain.torch.buckets import choose, make_channel

if TYPE_CHECKING:
    from hvdtrain.torch.exchange import Exchange

CANDIDATES = ("fp16", "int8", "onebit", "topk:0.01", "powersgd:4")
SETTLE = 3  # steps after a change that are not measured
TRIAL = 6  # steps measured of each choice in a round
ROUNDS = 2
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
        self.tell: Callable[[str], object] = print if ops.rank(exchange.group) == 0 else lambda line: None
        self.advice: dict[str, Any] | None = None
        self._course: Generator[None, None, None] | None = self._run()
        self._begun = time.perf_counter()
        self._seconds: list[float] = []  # of the steps of this trial
        self._ready: list[
            list[float]
        ] = []  # when each bucket was full, and the backward pass over, from a step's begin

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

    def _agree(self, value: T) -> T:
        """Rank 0's value."""
        return ops.gather_json(value, "advisor.agree", self.exchange.group)[0]  # type: ignore[no-any-return]

    def _steps(self, count: int, skip: int = SETTLE) -> Generator[None, None, list[float]]:
        """Let so many steps pass; the seconds of those that count, rank 0's on all ranks."""
        self._seconds, self._ready = [], []
        for _ in range(skip + count):
            yield
        return self._agree(self._seconds[skip:])

    def _run(self) -> Generator[None, None, None]:
        exchange = self.exchange
        # This step made the buckets; a warm-up is plain.
        while exchange.steps < exchange.spec.warmup:
            yield
        places = [i for i, bucket in enumerate(exchange.buckets) if bucket.coded]
        none: Choice = ("none",) * len(places)
        if not places:
            self.tell("advisor   none: no parameter is large enough to be worth compressing")
            return
        plain = yield from self._steps(TRIAL)
        *ready, end = self._agree([statistics.median(column) for column in zip(*self._ready[SETTLE:], strict=True)])
        network = probe.fit("advisor.network", exchange.group, exchange.buckets[0].channel.flat.device)
        costs = self._costs(places)
        fixed = [Cost("none", 0, 0, bucket.channel.wire_bytes, 1) for bucket in exchange.buckets]

        def modelled(choice: Choice) -> float:
            chosen = list(fixed)
            for place, method in zip(places, choice, strict=True):
                chosen[place] = costs[place, method]
            return cost.step_seconds(ready, end, chosen, network)

        # What the model leaves out (the update, loading) is the same for all.
        rest = statistics.median(plain) - modelled(none)
        predicted = {choice: modelled(choice) + rest for choice in shortlist(modelled, len(places))}
        hopeful = [c for c in predicted if c != none and predicted[c] < HOPEFUL * statistics.median(plain)][:TRIED]
        seconds: dict[Choice, list[float]] = {choice: [] for choice in hopeful} | {none: plain}
        # In turns, so that a machine or network that drifts favours none of them.
        for choice in (*hopeful, none) * ROUNDS if hopeful else ():
            self._assign(places, choice)
            seconds[choice] += yield from self._steps(TRIAL)
        measured = {choice: statistics.median(values) for choice, values in seconds.items()}
        baseline = measured[none]
        chosen = min(measured, key=lambda choice: measured[choice])
        if measured[chosen] > GAIN * baseline:
            chosen = none
        self._assign(places, chosen)
        self._report(places, network, costs, predicted, measured, chosen, none)
        yield from self._watch(places, chosen, none, baseline)

    def _watch(self, places: list[int], chosen: Choice, none: Choice, baseline: float) -> Generator[None, None, None]:
        """Go back to none, once, if the choice has become slower than none is now."""
        assert self.advice is not None
        interval = WATCH
        while chosen != none:
            seconds = statistics.median((yield from self._steps(interval, skip=0)))
            if seconds <= SLOWER * baseline:
                continue
            interval *= 2
            self._assign(places, none)
            baseline = statistics.median((yield from self._steps(TRIAL)))
            if baseline < seconds:
                self.tell(
                    f"advisor   back to none: {shown(chosen)} has come to {seconds * 1e3:.4g} ms a step, "
                    f"none takes {baseline * 1e3:.4g} ms"
                )
                self.advice |= {"chosen": list(none), "went_back_at_step": self.exchange.steps}
                return
            self._assign(places, chosen)

    def _assign(self, places: Sequence[int], choice: Choice) -> None:
        for place, method in zip(places, choice, strict=True):
            bucket = self.exchange.buckets[place]
            if bucket.method != method:
                choose(bucket, *self._method(method), self._key(place))

    def _costs(self, places: Sequence[int]) -> dict[tuple[int, str], Cost]:
        """What each method costs for each bucket that may have one."""
        exchange = self.exchange
        found = {}
        for place in places:
            bucket = exchange.buckets[place]
            found[place, "none"] = Cost("none", 0, 0, bucket.channel.wire_bytes, 1)
            for method in CANDIDATES:
                scratch = torch.empty_like(bucket.channel.flat)
                channel = make_channel(bucket, scratch, *self._method(method), self._key(place))
                found[place, method] = cost.measure(channel, method, repeats=2)
        return found

    def _method(self, text: str) -> tuple[Spec, str]:
        spec = replace(parse(text), feedback=self.exchange.spec.feedback)
        return spec, spec.argument

    def _key(self, place: int) -> Key:
        return Key(self.exchange.seed, 0, place, ops.rank(self.exchange.group))

    def _report(
        self,
        places: list[int],
        network: probe.Network,
        costs: dict[tuple[int, str], Cost],
        predicted: dict[Choice, float],
        measured: dict[Choice, float],
        chosen: Choice,
        none: Choice,
    ) -> None:
        """Set `advice`, and tell it in a table."""
        rows: list[dict[str, Any]] = []
        for choice in sorted(predicted, key=lambda choice: measured.get(choice, predicted[choice])):
            parts = [costs[place, method] for place, method in zip(places, choice, strict=True)]
            rows.append(
                {
                    "choice": list(choice),
                    "wire_bytes": sum(part.wire_bytes for part in parts),
                    "encode_seconds": sum(part.encode for part in parts),
                    "decode_seconds": sum(part.decode for part in parts),
                    "predicted_step_seconds": predicted[choice],
                    "measured_step_seconds": measured.get(choice),
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
            seconds = row["measured_step_seconds"]
            measured_ms = f"{seconds * 1e3:11.1f}" if seconds else "          -"
            self.tell(f"          {shown(row['choice']):16} {row['wire_bytes'] / 1e6:7.2f}  {shares}  {measured_ms}")
        self.tell(f"advisor   takes {shown(chosen)}: {reason}")


def shortlist(modelled: Callable[[Choice], float], buckets: int) -> list[Choice]:
    """Choices worth a look, the fastest by the model first: one method for all buckets, and the best mixture."""
    methods = ("none", *CANDIDATES)
    choices = sorted(((method,) * buckets for method in methods), key=modelled)
    best = choices[0]
    better = True
    while better:  # one bucket's method at a time, as long as it helps
        better = False
        for place in range(buckets):
            for method in methods:
                candidate = (*best[:place], method, *best[place + 1 :])
                if modelled(candidate) < modelled(best) * (1 - 1e-6):
                    best, better = candidate, True
    return [best, *(choice for choice in choices if choice != best)]


def shown(choice: Sequence[str]) -> str:
    """A choice for people: a method, or methods with their numbers of buckets."""
    counts = {method: choice.count(method) for method in dict.fromkeys(choice)}
    return next(iter(counts)) if len(counts) == 1 else "+".join(f"{n}x{method}" for method, n in counts.items())
