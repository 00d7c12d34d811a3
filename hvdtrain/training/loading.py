"""A run read back from its folder: `hvdtrain.load`, and what `hvdtrain evaluate` and `hvdtrain predict` begin with.

read_run_files(run_dir)   config.json and the kept source, as plain data that one rank can send to the others
import_run_class(files)   the recipe's class; executes the kept source
open_run(files, cls)      the recipe with its options, and the run options
find_checkpoint           "best", "last" or a step
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.recipe.base import Recipe
from hvdtrain.recipe.before_import import prepare_imports
from hvdtrain.recipe.framework import find_framework
from hvdtrain.recipe.kept_source import load_kept_class
from hvdtrain.recipe.now import Now, set_now
from hvdtrain.recipe.options import OptionValues
from hvdtrain.recipe.source import RecipeSource
from hvdtrain.recipe.source_copy import SOURCE_FOLDER, read_files
from hvdtrain.system.errors import UserError
from hvdtrain.system.strict_json import JsonObject
from hvdtrain.training import checkpoint
from hvdtrain.training.config import ConfigReader, RunConfig, read_config
from hvdtrain.training.options import RunOptions, make_recipe, make_run_options


@dataclass(frozen=True)
class RunFiles:
    """The configuration and the kept source of a run, as JSON can hold them."""

    folder: str
    config: JsonObject  # a RunConfig's fields
    source: Mapping[str, str]  # the kept files, in base64, by their relative paths


@dataclass(frozen=True)
class OpenedRun:
    """A run that was read back.

    Attributes:
        folder: the run folder.
        name: of the recipe, in the run folder.
        recipe: with the run's options.
        values: the run's options, those of the recipe included, by their flat names.
    """

    folder: Path
    name: str
    recipe: Recipe
    values: OptionValues

    @property
    def options(self) -> RunOptions:
        """Return the run options."""
        return make_run_options(self.values)


def load(
    run_dir: str | os.PathLike[str],
    which: str | int = "best",
    *,
    device: str = "cpu",
    cls: type[Recipe] | None = None,
) -> tuple[Any, Any]:
    """Return the recipe of a run, with its options, and its model, in evaluation mode.

    The recipe comes from the source that the run folder keeps, also if its file has changed or is gone since. THIS
    EXECUTES THAT SOURCE: load only runs that you trust as you trust a program. With --ema, the weights are the averaged
    ones, which the run has evaluated.

    Args:
        run_dir: the run folder.
        which: the checkpoint: "best", "last", or a step that has one.
        device: to put the model on.
        cls: the recipe's class, instead of that of the kept source, which is not executed then: for a run whose recipe
            was defined in a notebook.

    Raises:
        UserError: there is no such run or checkpoint, it is damaged, or its recipe cannot be imported.
    """
    files = read_run_files(Path(run_dir))
    run = open_run(files, cls or import_run_class(files))
    set_now(run.recipe, Now.before_training(run.folder.absolute(), rank=0, size=1))
    framework = find_framework(type(run.recipe))
    if framework.load_model is None:
        raise UserError(f"{run_dir}: models of the framework {framework.name} cannot be loaded")
    found = checkpoint.read_checkpoint(find_checkpoint(run, which), run.name)
    return run.recipe, framework.load_model(run.recipe, found.state, run.options.data.seed, device)


def read_run_files(run_dir: Path) -> RunFiles:
    """Read a run folder's config.json and kept source. Raises UserError if that fails."""
    config = read_config(run_dir)
    if config is None:
        raise UserError(f"{run_dir} is not a run folder: it has no config.json")
    try:
        source = read_files(run_dir / SOURCE_FOLDER)
    except OSError as error:
        raise UserError(f"{run_dir / SOURCE_FOLDER} cannot be read: {error.strerror}") from error
    encoded = {name: base64.b64encode(data).decode() for name, data in source.items()}
    return RunFiles(str(run_dir), vars(config), encoded)


def import_run_class(files: RunFiles) -> type[Recipe]:
    """Import a run's recipe from its kept source, which is executed. Raises UserError if that fails."""
    config, folder = RunConfig(**files.config), Path(files.folder)
    if not files.source:
        raise UserError(
            f"{folder} has no {SOURCE_FOLDER}/: the run's recipe was in no file, as in a notebook; give its class: "
            "hvdtrain.load(..., cls=Mine)"
        )
    kept = {name: base64.b64decode(data) for name, data in files.source.items()}
    main = config.source["main"] if config.source is not None else guess_main_file(config.name, kept)
    if main not in kept:
        raise UserError(f"{folder / SOURCE_FOLDER} has no {main}, the file of the run's recipe")
    source = RecipeSource(
        root=Path(config.source["root"]) if config.source is not None else (folder / SOURCE_FOLDER).absolute(),
        main=main,
        module="",
        has_relative_imports=False,
        files={main: kept.pop(main), **kept},
        display_path=folder / SOURCE_FOLDER / main,
    )
    options = config.content.get("recipe")
    backend = options.get("backend") if isinstance(options, dict) else None
    prepare_imports([str(config.content.get("framework"))], backend if isinstance(backend, str) else None)
    return load_kept_class(source, config.name, config.class_name)


def open_run(files: RunFiles, cls: type[Recipe]) -> OpenedRun:
    """Return a run with a recipe of class `cls`. Raises UserError if the run's options are not the class's."""
    config, folder = RunConfig(**files.config), Path(files.folder)
    values = ConfigReader(folder / "config.json", cls).read_options(config.content)
    return OpenedRun(folder, config.name, make_recipe(cls, values), values)


def guess_main_file(name: str, files: Mapping[str, bytes]) -> str:
    """Return the recipe's file among kept ones, of a run whose config.json does not name it."""
    stem = name.partition(":")[0]
    return next((file for file in files if Path(file).stem == stem), f"{stem}.py")


def find_checkpoint(run: OpenedRun, which: str | int) -> Path:
    """Return the folder of a run's checkpoint. Raises UserError, with those that there are.

    which: "best", "last", or a step, also as text.
    """
    folders = checkpoint.list_checkpoints(run.folder)
    if not folders:
        raise UserError(f"{run.folder} has no checkpoint")
    if which == "last":
        return folders[-1]
    if which == "best":
        best = checkpoint.find_best_checkpoint(run.folder, run.recipe.best)
        if best is None:
            raise UserError(f"{run.folder} has no best checkpoint: none was evaluated; expected 'last' or a step")
        which = best.step
    steps = [checkpoint.step_from_folder(folder) for folder in folders]
    if not str(which).isdecimal() or int(which) not in steps:
        raise UserError(
            f"{run.folder} has no checkpoint {which!r}; expected 'best', 'last', or a step of "
            f"{', '.join(map(str, steps))}"
        )
    return folders[steps.index(int(which))]
