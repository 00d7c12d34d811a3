"""Packages that tests need, found without importing them: TensorFlow would cost pytest's process 700 MB."""

from __future__ import annotations

import importlib.util
import os

import pytest


def require_packages(*names: str) -> None:
    """Skip a test, or a module as it is imported, if a package is not installed; where CI runs, fail instead."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("CI"):
        raise AssertionError(f"{missing[0]} is not installed, which CI is to test with")
    if missing:
        pytest.skip(f"{missing[0]} is not installed", allow_module_level=True)
