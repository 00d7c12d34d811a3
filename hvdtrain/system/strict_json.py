"""Write JSON without the values that JSON does not have (NaN, Infinity), and read it strictly.

The functions that read raise ValueError with a text that continues the file's name: "has 'x' as position.step; ...".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import reprlib
from typing import Any, NoReturn, TypeAlias

INTEGER_BOUND = 2**64  # larger integers are rejected
JsonObject: TypeAlias = dict[str, Any]  # a JSON object whose entries are not checked yet: they may be anything


def encode_json(value: Any, indent: int | None = None) -> str:
    """Return the JSON text of a value; numbers that are not finite become null."""
    return json.dumps(finite_or_none(value), indent=indent, allow_nan=False)


def finite_or_none(value: Any) -> Any:
    """Return a value for JSON with None in place of each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(inner) for inner in value]
    return value


def parse_strict_json(data: bytes) -> Any:
    """Parse JSON. Raises ValueError, also for NaN and Infinity and for text that is nested too deeply."""
    try:
        return json.loads(data, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def encode_with_digest(content: JsonObject) -> bytes:
    """Return the indented JSON of an object with, as its last entry, the SHA-256 of its JSON without that entry."""
    digest = hashlib.sha256(encode_json(content, indent=2).encode()).hexdigest()
    return (encode_json({**content, "sha256": digest}, indent=2) + "\n").encode()


def check_entries(content: Any, where: str, *names: str) -> JsonObject:
    """Return an object that has exactly these entries. Raises ValueError if it is none, or has others."""
    if not isinstance(content, dict):
        raise ValueError(f"has no object {where.rstrip('.')!r}")
    for name in names:
        if name not in content:
            raise ValueError(f"lacks {where}{name}")
    for name in content:
        if name not in names:
            raise ValueError(f"has an unknown entry {where}{name}")
    return content


def check_count(value: Any, where: str) -> int:
    """Return a count. Raises ValueError if the value is anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < INTEGER_BOUND:
        raise ValueError(f"has {reprlib.repr(value)} as {where}; expected an integer from 0 on")
    return value


def check_finite_number(value: Any, where: str) -> float:
    """Return a finite number. Raises ValueError if the value is anything else."""
    with contextlib.suppress(OverflowError):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise ValueError(f"has {reprlib.repr(value)} as {where}; expected a finite number")
