"""Time limits that the environment can change."""

from __future__ import annotations

from collections.abc import Mapping

from hvdtrain.system.errors import UserError


def read_time_limit(environ: Mapping[str, str], name: str, default: float) -> float:
    """The seconds that a variable of the environment gives, or the default. Raises UserError for anything else."""
    text = environ.get(name, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 604_800:
        raise UserError(f"{name} is {text!r}; expected seconds, from 0.1 to 604800")
    return seconds
