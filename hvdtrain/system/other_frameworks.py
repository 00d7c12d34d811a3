"""JAX and TensorFlow in a process that also has torch: the order of imports, TensorBoard, forks.

Nothing here imports either of them, and a process that uses neither pays nothing for it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

JAX_FORK_WARNING = r"os\.fork\(\) was called\. .*JAX is multithreaded"
TENSORBOARD_SWITCH = "tensorboard.compat.notf"  # if this module exists, TensorBoard uses its own stub of TensorFlow


class UsedInLoaderError(Exception):
    """JAX or TensorFlow was used in a forked process; the text continues one that names the recipe's call."""


class TritonFirst(importlib.abc.MetaPathFinder):
    """Imports triton when TensorFlow is about to be imported, and finds no module itself."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == "tensorflow":
            sys.meta_path.remove(self)
            with contextlib.suppress(ImportError):
                importlib.import_module("triton")


def guard_tensorflow_import() -> None:
    """From now on, import triton before TensorFlow, whoever imports that.

    In the other order triton's library crashes the process (SIGSEGV), and torch imports it for `torch.compile`,
    `torch.use_deterministic_algorithms` and in torchvision. If TensorFlow is there already, triton is declared missing:
    torch then does without.
    """
    if "triton" in sys.modules or any(isinstance(finder, TritonFirst) for finder in sys.meta_path):
        return
    if "tensorflow" in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]  # `import` then raises ModuleNotFoundError
    else:
        sys.meta_path.insert(0, TritonFirst())


@contextlib.contextmanager
def tensorboard_without_tensorflow() -> Iterator[None]:
    """Keep what is imported from TensorBoard in this block from importing TensorFlow, which takes 10 s and 550 MB."""
    added = TENSORBOARD_SWITCH not in sys.modules and "tensorflow" not in sys.modules
    if added:
        sys.modules[TENSORBOARD_SWITCH] = ModuleType(TENSORBOARD_SWITCH)
    try:
        yield
    finally:
        if added:
            del sys.modules[TENSORBOARD_SWITCH]


@contextlib.contextmanager
def no_jax_fork_warning() -> Iterator[None]:
    """Suppress JAX's warning of a fork in this block: the child calls `refuse_in_loader`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", JAX_FORK_WARNING, RuntimeWarning)
        yield


def refuse_in_loader() -> None:
    """In a forked process: let operations of JAX and TensorFlow raise UsedInLoaderError.

    They would wait for ever for threads that only the parent has: at some sizes, while others are computed by the
    caller itself.
    """
    if (jax := sys.modules.get("jax")) is not None:
        jax.clear_caches()  # compiled functions would not ask for the backend
        bridge: Any = importlib.import_module("jax._src.xla_bridge")
        bridge.backends = bridge.get_backend = _refuse_jax
    context: Any = sys.modules.get("tensorflow.python.eager.context")
    if context is not None:
        context._context = _RefusedContext()


def _refuse_jax(*_: object, **__: object) -> NoReturn:
    raise refusal("JAX")


class _RefusedContext:
    """TensorFlow's eager context, which each of its operations asks for something."""

    def __getattr__(self, name: str) -> NoReturn:
        raise refusal("TensorFlow")


def refusal(framework: str) -> UsedInLoaderError:
    """Return the error for an operation of a framework in a loader process."""
    return UsedInLoaderError(
        f"uses {framework} in a loader process, where it hangs: use numpy there, or load without such processes "
        "(--workers 0)"
    )
