"""What `--compression auto` has measured and chosen, for the run folder and for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hvdtrain.comm.network_model import NetworkModel

Choice = tuple[str, ...]  # a method for each compressible bucket


@dataclass(frozen=True)
class ChoiceReport:
    """What was predicted and measured of a choice; a row of the table."""

    choice: list[str]
    wire_bytes: int  # sent by a rank in a step
    encode_seconds: float
    decode_seconds: float
    predicted_step_seconds: float
    measured_step_seconds: float | None  # None: not tried
    measured_steps: int


@dataclass(frozen=True)
class Advice:
    """What was measured and chosen; the same on all ranks."""

    network: NetworkModel
    rows: list[ChoiceReport]  # the fastest first
    chosen: list[str]
    reason: str
    at_step: int
    went_back_at_step: int | None = None  # when none was taken again

    def to_json(self) -> dict[str, object]:
        """Return what the run folder's advisor.json holds."""
        found: dict[str, object] = {
            "network": {"latency_seconds": self.network.latency, "bytes_per_second": self.network.bandwidth},
            "rows": [asdict(row) for row in self.rows],
            "chosen": self.chosen,
            "reason": self.reason,
            "at_step": self.at_step,
        }
        return found if self.went_back_at_step is None else found | {"went_back_at_step": self.went_back_at_step}


def explain_choice(chosen: Choice, none: Choice, measured: dict[Choice, float]) -> str:
    """Return why a choice was taken. measured: seconds of a step, by choice."""
    others = {choice: seconds for choice, seconds in measured.items() if choice != none}
    if chosen != none:
        return f"its steps take {measured[chosen] / measured[none]:.2f} of the time of none's, measured"
    if others:
        best = min(others, key=lambda choice: others[choice])
        ratio = others[best] / measured[none]
        return f"the best other, {format_choice(best)}, takes {ratio:.2f} of its time, measured"
    return "every other is predicted to take longer"


def format_choice(choice: Sequence[str]) -> str:
    """Return a choice for logs: a method, or methods with their numbers of buckets ("2xint8+1xnone")."""
    counts = {method: choice.count(method) for method in dict.fromkeys(choice)}
    return next(iter(counts)) if len(counts) == 1 else "+".join(f"{n}x{method}" for method, n in counts.items())


def format_advice(advice: Advice) -> list[str]:
    """Return the lines of the table that is logged."""
    network = advice.network
    lines = [
        f"advisor   network {network.bandwidth * 8 / 1e9:.3g} Gbit/s, {network.latency * 1e3:.2g} ms a collective",
        "          method           wire MB  encode ms  decode ms  predicted ms  measured ms",
    ]
    for row in advice.rows:
        coding = f"{row.encode_seconds * 1e3:9.1f}  {row.decode_seconds * 1e3:9.1f}"
        predicted = f"{row.predicted_step_seconds * 1e3:12.1f}"
        step = row.measured_step_seconds
        measured = f"{step * 1e3:11.1f}" if step else "          -"
        method = f"{format_choice(row.choice):16} {row.wire_bytes / 1e6:7.2f}"
        lines.append(f"          {method}  {coding}  {predicted}  {measured}")
    return [*lines, f"advisor   takes {format_choice(advice.chosen)}: {advice.reason}"]
