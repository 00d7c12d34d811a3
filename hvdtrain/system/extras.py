"""The optional dependencies of hvdtrain: which extra has a package that is missing."""

from __future__ import annotations

import platform
import sys

# Name of the module or the package in an error, name of the package, extra of hvdtrain that installs it or "".
EXTRAS = {
    "babel": ("babel", "recipes"),
    "gymnasium": ("gymnasium", "recipes"),
    "sacrebleu": ("sacrebleu", "recipes"),
    "sklearn": ("scikit-learn", "recipes"),
    "scikit-learn": ("scikit-learn", "recipes"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "matplotlib": ("matplotlib", "plots"),
    "pynvml": ("nvidia-ml-py", "gpu"),
    "jax": ("jax", "jax"),
    "jaxlib": ("jaxlib", "jax"),
    "optax": ("optax", "jax"),
    "flax": ("flax", ""),
    "equinox": ("equinox", ""),
    "keras": ("keras", "keras"),
    "tensorflow": ("tensorflow", "tensorflow"),
}
# By extra: the versions of Python for which there are packages, the first and, if there is one, the last.
PYTHON_VERSIONS = {"jax": ((3, 11), None), "keras": ((3, 11), None), "tensorflow": ((3, 11), (3, 13))}


def explain_missing_extra(error: BaseException) -> str | None:
    """Return in one line how to install the optional package whose absence raised an error; None for other errors."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return None
    package, extra = EXTRAS[name]
    first, last = PYTHON_VERSIONS.get(extra, ((3, 0), None))
    if not first <= sys.version_info[:2] <= (last or sys.version_info[:2]):
        expected = f"3.{first[1]} or later" if last is None else f"3.{first[1]} to 3.{last[1]}"
        return f"{package} is not installed, and needs Python {expected}; this is {platform.python_version()}"
    return f"{package} is not installed: pip install " + (f"'hvdtrain[{extra}]'" if extra else package)
