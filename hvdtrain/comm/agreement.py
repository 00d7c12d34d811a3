"""Compare what has to be the same on all ranks, before the first step, and report the first difference.

    each rank:  parts -> a hash of each part -> one all-gather of hashes -> all equal: done
                                                                         -> else: the values of the first part that
                                                                            differs are gathered, and all ranks raise

In an elastic run, whose workers are alone when they start, the first worker writes a record of its parts to the
key-value store, and each later worker compares its own parts with the record.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hvdtrain.comm import collectives
from hvdtrain.comm.world import World
from hvdtrain.system.errors import KnownError, RunError, UserError
from hvdtrain.system.records import parse_record

DIGEST_BYTES = 16
MAX_RECORDED_BYTES = 32 << 10  # of a part's values as JSON; only the hash is recorded of longer ones


@dataclass(frozen=True)
class ConsistentPart:
    """Something that has to be the same everywhere.

    Attributes:
        name: of the part.
        values: what it consists of, by the name of each value: {"--batch-size": "16"}.
        difference_message: the message for a value that differs, a format of {who} and {base} (two ranks, the first
            with its host, or this worker and the run), {rank} ({who} without its host), {key}, {here} and {there} (the
            value on each).
        absent_text: stands for a value that only the other one has.
        recompute: computes the values once more, if they may be different each time; such values are not compared.
    """

    name: str
    values: Mapping[str, str]
    difference_message: str
    absent_text: str = "none"
    recompute: Callable[[], Mapping[str, str]] | None = None

    @property
    def values_digest(self) -> bytes:
        """The hash of the part's name and values."""
        data = json.dumps([self.name, sorted(self.values.items())]).encode()
        return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()

    def find_stable_values(self) -> dict[str, str]:
        """Return the values, without those that are different when they are computed again."""
        again = self.recompute() if self.recompute is not None else self.values
        return {key: value for key, value in self.values.items() if again.get(key) == value}

    def describe_difference(self, here: Mapping[str, str], there: Mapping[str, str], who: str, base: str) -> str | None:
        """Describe the first difference between the values of two ranks; None if they are the same."""
        key = find_first_difference(here, there)
        if key is None:
            return None
        values = {"here": here.get(key, self.absent_text), "there": there.get(key, self.absent_text)}
        return self.difference_message.format(who=who, rank=who.partition(" on ")[0], base=base, key=key, **values)


@dataclass(frozen=True)
class RecordedPart:
    """A part as the first worker of an elastic run has recorded it.

    Attributes:
        digest: hexadecimal hash of the part.
        values: its values by name; None if they are too long to be recorded.
    """

    digest: str
    values: list[tuple[str, str]] | None


def find_first_difference(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """Return the first key whose values differ; None if there is none."""
    return next((key for key in [*there, *here] if here.get(key) != there.get(key)), None)


def check_agreement(name: str, parts: Sequence[ConsistentPart], group: collectives.Group = None) -> None:
    """Check that all ranks have the same parts. All ranks call it, with the same parts in the same order.

    Args:
        name: of the collective.
        parts: this rank's.
        group: the ranks that take part; None: all.

    Raises:
        UserError: on all ranks, for the first difference in the first part that differs, with the rank that has it.
    """
    if collectives.size(group) == 1:
        return
    own = np.frombuffer(b"".join(part.values_digest for part in parts), np.uint8).reshape(len(parts), DIGEST_BYTES)
    everyone = collectives.gather_array(own, name, group)  # (ranks, parts, DIGEST_BYTES)
    differing = (everyone != everyone[0]).any(axis=(0, 2)).tolist()
    for part in (part for part, differs in zip(parts, differing, strict=True) if differs):
        _raise_difference(f"{name}.values", part, group)


def _raise_difference(name: str, part: ConsistentPart, group: collectives.Group) -> None:
    """Raise UserError for the first difference of a part between ranks, if its values are stable."""
    try:
        stable = part.find_stable_values()
    except KnownError:  # it worked before, so none of its values is stable
        stable = {}
    answers = collectives.gather_json(
        [collectives.rank(), socket.gethostname(), list(stable.items()), list(part.values)], name, group
    )
    unstable = {key for *_, items, keys in answers for key in keys if key not in dict(items)}
    values = [{key: value for key, value in items if key not in unstable} for *_, items, _ in answers]
    base = f"rank {answers[0][0]}"
    for (rank, host, *_), here in zip(answers, values, strict=True):
        if text := part.describe_difference(here, values[0], f"rank {rank} on {host}", base):
            error = UserError(text)
            error.origin = rank
            raise error


def make_agreement_record(parts: Sequence[ConsistentPart]) -> dict[str, RecordedPart]:
    """Return, by the parts' names, what later workers of an elastic run compare their own parts with."""
    entries = {}
    for part in parts:
        items = list(part.values.items())
        short = len(json.dumps(items)) <= MAX_RECORDED_BYTES
        entries[part.name] = RecordedPart(part.values_digest.hex(), items if short else None)
    return entries


def parse_agreement_record(value: object) -> dict[str, RecordedPart]:
    """Return a record that came as JSON. Raises RunError if it is not one."""
    try:
        record: dict[str, RecordedPart] = parse_record(value, dict[str, RecordedPart])
    except ValueError as error:
        raise RunError(f"the run's record of what all its workers must have the same is invalid: {error}") from None
    return record


def check_against_record(parts: Sequence[ConsistentPart], recorded: Mapping[str, RecordedPart], world: World) -> None:
    """Raise UserError for the first difference between this worker's parts and the record of the run's first worker."""
    for part in parts:
        entry = recorded.get(part.name)
        if entry is None:
            raise UserError(f"this worker on {world.host}: the run has no {part.name} to compare with: another version")
        if entry.digest == part.values_digest.hex():
            continue
        who = f"this worker on {world.host}"
        if entry.values is None:
            raise UserError(f"{who}: its {part.name} differ from those of the run")
        here, there = part.find_stable_values(), dict(entry.values)
        unstable = part.values.keys() - here.keys()
        there = {key: value for key, value in there.items() if key not in unstable}
        if text := part.describe_difference(here, there, who, "the run"):
            raise UserError(text)
