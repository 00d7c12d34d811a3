"""JSON that is written without what JSON does not have, and read back strictly.

The functions that read raise ValueError with a text that goes on from the file's name: "has 'x' as position.step; ...".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import reprlib
from typing import Any, NoReturn

INTEGER_BOUND = 2**64  # integers that are read are below it


def encode_json(value: Any, indent: int | None = None) -> str:
    """JSON text of a value, in which numbers that are not finite, which JSON does not have, are null."""
    return json.dumps(finite_or_none(value), indent=indent, allow_nan=False)


def finite_or_none(value: Any) -> Any:
    """A value for JSON with None for each number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(inner) for inner in value]
    return value


def parse_strict_json(data: bytes) -> Any:
    """The value of strict JSON. Raises ValueError, also for NaN and Infinity and for text nested too deeply."""
    try:
        return json.loads(data, parse_constant=_reject_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def encode_with_digest(content: dict[str, Any]) -> bytes:
    """Indented JSON of an object and, as its last entry, the SHA-256 of its JSON without that."""
    digest = hashlib.sha256(encode_json(content, indent=2).encode()).hexdigest()
    return (encode_json({**content, "sha256": digest}, indent=2) + "\n").encode()


def check_entries(content: Any, where: str, *names: str) -> dict[str, Any]:
    """Exactly these entries of an object. Raises ValueError."""
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
    """A count. Raises ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < INTEGER_BOUND:
        raise ValueError(f"has {reprlib.repr(value)} as {where}; expected an integer from 0 on")
    return value


def check_finite_number(value: Any, where: str) -> float:
    """A finite number. Raises ValueError for anything else."""
    with contextlib.suppress(OverflowError):
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise ValueError(f"has {reprlib.repr(value)} as {where}; expected a finite number")
