"""Which backend Keras gets, before Keras is imported."""

from __future__ import annotations

import importlib.util
import os
import sys

from hvdtrain.system.errors import UserError
from hvdtrain.system.extras import explain_missing_extra
from hvdtrain.system.other_frameworks import guard_tensorflow_import

BACKENDS = ("jax", "tensorflow", "torch")  # in the order of preference
# TensorFlow's messages on standard error; and one order of sums in its operations on all processors.
TENSORFLOW_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}


def current_backend() -> str:
    """Return the backend that Keras has, or will be imported with."""
    if "keras" in sys.modules:
        return sys.modules["keras"].config.backend()  # type: ignore[no-any-return]
    named = os.environ.get("KERAS_BACKEND")
    return named or next((name for name in BACKENDS if importlib.util.find_spec(name) is not None), BACKENDS[0])


def prepare_keras(backend: str | None = None) -> None:
    """Make Keras importable in this process, with a backend; before anything imports it.

    Args:
        backend: its name; None: what KERAS_BACKEND names, else the first of BACKENDS that is installed.

    Raises:
        UserError: there is no such backend, or Keras or the backend is not installed.
    """
    backend = backend or current_backend()
    if backend not in BACKENDS:
        raise UserError(f"Keras's backend is {backend!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    for name in ("keras", backend):
        if importlib.util.find_spec(name) is None and (
            missing := explain_missing_extra(ModuleNotFoundError(name=name))
        ):
            raise UserError(missing)
    for name, value in TENSORFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    guard_tensorflow_import()
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = backend
