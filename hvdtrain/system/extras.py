"""The optional dependencies of hvdtrain: which extra has a package that is missing."""

from __future__ import annotations

# Name of the module or the package in an error, name of the package, extra of hvdtrain that installs it.
EXTRAS = {
    "babel": ("babel", "recipes"),
    "gymnasium": ("gymnasium", "recipes"),
    "sacrebleu": ("sacrebleu", "recipes"),
    "sklearn": ("scikit-learn", "recipes"),
    "scikit-learn": ("scikit-learn", "recipes"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "matplotlib": ("matplotlib", "plots"),
}


def explain_missing_extra(error: BaseException) -> str | None:
    """Return in one line how to install the optional package whose absence raised an error; None for other errors."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in EXTRAS:
        return None
    package, extra = EXTRAS[name]
    return f"{package} is not installed: pip install 'hvdtrain[{extra}]'"
