"""Report errors in a recipe's own code: a line that names class and method, and the recipe's part of the traceback."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from hvdtrain.system.errors import KnownError, RecipeError, UserError
from hvdtrain.system.extras import explain_missing_extra
from hvdtrain.system.other_frameworks import UsedInLoaderError
from hvdtrain.system.shared_memory import explain_full_shared_memory

PACKAGE = Path(__file__).parents[1]
HIDDEN_PACKAGES = ("torch", "horovod", "jax", "optax", "flax", "equinox", "keras", "tensorflow")
HIDDEN_FILES = ("<frozen ", "<string>")  # of Python's own machinery, and the __init__ of a dataclass
JAX_NOTE = "JAX has removed its internal frames"  # of a note that it adds to errors
PEERS_LOST = "HorovodInternalError"  # by name: processes without Horovod use this module too


@contextlib.contextmanager
def in_recipe(recipe: object, call: str) -> Iterator[None]:
    """Turn what a recipe's code raises in this block into a RecipeError that names the recipe's class and `call`.

    The block should hold only the call of the recipe's method:

        with in_recipe(recipe, "model()"):
            model = recipe.model()
        with in_recipe(recipe, f"dataset('train')[{i}]"):  # -> Mine.dataset('train')[7] raised ValueError: ...
            example = dataset[i]

    A recipe may raise UserError or RunError itself; these pass, and so does a lost peer (a collective in the recipe).
    A wrong return value is not an exception: check it after the block and raise UserError with `name_call`.

    Args:
        recipe: the recipe, or its class.
        call: the method as a user would write the call, e.g. "score()" or "dataset('train')".

    Raises:
        RecipeError: any other exception, sys.exit included; its `trace` has the recipe's frames only.
        RunError: /dev/shm, through which loader processes pass their batches, is full.
        UserError: a package is missing that one of hvdtrain's extras installs.
    """
    try:
        yield
    except KnownError:
        raise
    except UsedInLoaderError as error:
        raise RecipeError(f"{name_call(recipe, call)} {error}") from error
    except SystemExit as error:
        text = f"called sys.exit({'' if error.code is None else repr(error.code)}): a recipe must not end the process"
        raise RecipeError(f"{name_call(recipe, call)} {text}", recipe_traceback(error)) from error
    except Exception as error:
        if any(cls.__name__ == PEERS_LOST for cls in type(error).__mro__):
            raise
        if full := explain_full_shared_memory(error):
            raise full from error
        if missing := explain_missing_extra(error):
            raise UserError(f"{name_call(recipe, call)}: {missing}") from error
        raise RecipeError(
            f"{name_call(recipe, call)} raised {describe_error(error)}", recipe_traceback(error)
        ) from error


def name_call(recipe: object, call: str) -> str:
    """Return the call with the recipe's class before it: `Mine.dataset('train')`."""
    cls = recipe if isinstance(recipe, type) else type(recipe)
    return f"{cls.__name__}.{call}"


def describe_error(error: BaseException) -> str:
    """Return an error's class and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe_import_error(error: BaseException, file: Path, shown: Path) -> str:
    """Return the message that a recipe's file cannot be imported, with the line in it that failed.

    Args:
        error: that was raised.
        file: as frames name it.
        shown: its path for users.
    """
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    where = f"{shown}:{lines[-1]}" if lines else f"{shown}"
    if missing := explain_missing_extra(error):
        return f"{where}: {missing}"
    return f"{where} cannot be imported: {describe_error(error)}"


def recipe_traceback(error: BaseException) -> str:
    """Return the traceback of an error, and of those that led to it, without the frames of hvdtrain and the frameworks.

    It is what Python prints; "" if no other frame is in it.
    """
    described = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = described
    while part is not None:
        kept = [frame for frame in part.stack if not is_hidden(frame.filename)]
        part.stack = traceback.StackSummary.from_list(kept)
        notes = getattr(part, "__notes__", None) or []
        vars(part)["__notes__"] = [note for note in notes if JAX_NOTE not in str(note)]
        part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)
    return "".join(described.format()) if described.stack else ""


def is_hidden(filename: str) -> bool:
    """Return whether a file belongs to hvdtrain (its own recipes excepted), a framework or Python."""
    if filename.startswith(HIDDEN_FILES) or filename == contextlib.__file__:
        return True
    path = Path(filename)
    if PACKAGE in path.parents:
        return PACKAGE / "recipes" not in path.parents
    modules = [sys.modules[name] for name in HIDDEN_PACKAGES if name in sys.modules]
    return any(Path(module.__file__).parent in path.parents for module in modules if module.__file__)
