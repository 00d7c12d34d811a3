"""What a launch line starts: a recipe, or a program, which hvdtrain never imports or runs itself.

    launch -np 2 digits, mine.py, mine.py:Mine    a recipe
    launch -np 2 train.py --lr 1                  a program: no class of the file can be a recipe
    launch -np 2 -- python train.py --lr 1        a program, whatever it is

Everything else is refused with the line to write.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hvdtrain.cli.sides import LaunchLine
from hvdtrain.launch.launcher import bin_folder
from hvdtrain.system.errors import EXIT_NOT_EXECUTABLE, CommandError, UserError, suggest_nearest

if TYPE_CHECKING:
    from hvdtrain.recipe.classes import CandidateClass

OTHER_LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "horovodrun", "mpirun", "mpiexec", "srun", "hvdtrain")
SHELL_SYNTAX = re.compile(r"[|&;<>$`*]")
ASSIGNMENT = re.compile(r"\w+=")


def find_program(line: LaunchLine) -> list[str] | None:
    """Return what each rank runs if a launch line starts a program; None if it starts a recipe.

    Raises UserError if it is neither, or it cannot be seen which, or the program has options of recipes before it.
    """
    if line.is_command:
        check_command(line)
        command = list(line.rest)
    elif is_program_file(line.rest[0]):
        command = [sys.executable, *line.rest]
    else:
        refuse_other_target(line)
        return None
    if line.run:
        words = ["--", *line.rest] if line.is_command else line.rest
        raise UserError(
            f"{line.run[0]} is an option of recipes, and {line.rest[0]} is a program: a program's own options come "
            f"after it: {line.show(*words, *line.run)}"
        )
    return command


def is_program_file(target: str) -> bool:
    """Return whether a word names a Python file no class of which can be a recipe.

    Raises UserError if that cannot be seen without running it, or it does not parse.
    """
    path = Path(target)
    if path.suffix != ".py" or not path.is_file():
        return False
    from hvdtrain.recipe.base_classes import RecipeStatus
    from hvdtrain.recipe.classes import read_all_classes
    from hvdtrain.recipe.source import read_main_file

    classes = read_all_classes(read_main_file(path))
    if any(cls.status == RecipeStatus.RECIPE and "." not in cls.name for cls in classes):
        return False
    if classes:
        refuse_unclear_file(target, max(classes, key=lambda cls: cls.status))
    return True


def refuse_unclear_file(target: str, cls: CandidateClass) -> NoReturn:
    """Raise UserError for a file with a class that may be a recipe, with both ways to start it."""
    outer, _, name = cls.name.rpartition(".")
    where = f", in {outer}," if outer else ""
    move = " once it is at the top level of the file" if outer else ""
    raise UserError(
        f"{target} is not run: its class {name}{where} {cls.describe_doubt()} a recipe, as far as can be seen without "
        f"running it: `hvdtrain launch {shlex.quote(f'{target}:{name}')}` starts it as a recipe{move}, "
        f"`hvdtrain launch -- python {shlex.quote(target)}` as a program"
    )


def refuse_other_target(line: LaunchLine) -> None:
    """Raise UserError, with the line to write, if the first word of a line is neither a recipe nor a Python file."""
    from hvdtrain.recipe.registry import find_all_recipes, recipe_folders, split_recipe_spec

    target, path = line.rest[0], Path(line.rest[0])
    if split_recipe_spec(target)[1] or (path.suffix == ".py" and path.is_file()):
        return
    is_name = path.name == target and path.suffix != ".py"
    if is_name and any((folder / f"{target}.py").is_file() for folder in recipe_folders()):
        return
    if is_name and target in OTHER_LAUNCHERS:
        raise UserError(
            f"{target!r} starts ranks itself, and `hvdtrain launch` takes its place: hvdtrain launch -np N script.py "
            "ARGUMENTS; on the options of both: docs/programs.md"
        )
    refuse_shell_line(line)
    if path.is_dir():
        refuse_folder(line)
    if path.is_file():
        raise UserError(f"{target!r} is neither a recipe nor a Python file; as a program: {show_runner(line)}")
    if is_name and find_executable(target):
        raise UserError(f"no recipe {target!r}; to start the program of this name: {line.show('--', *line.rest)}")
    if not is_name:
        raise UserError(f"no file {target!r}{suggest_file(path)}")
    if Path(f"{target}.py").is_file():
        raise UserError(
            f"no recipe {target!r}; to start the file of this name: {line.show(f'{target}.py', *line.rest[1:])}"
        )
    near = suggest_nearest(target, {recipe.path.stem for recipe in find_all_recipes()}, list_all=False)
    if not near:
        raise UserError(
            f"no recipe {target!r} (`hvdtrain list` shows those found), nor a program; if other hosts have such a "
            f"program: {line.show('--', *line.rest)}"
        )


def check_command(line: LaunchLine) -> None:
    """Raise UserError, with the line to write, if what follows `--` is not a program."""
    if not line.rest or not line.rest[0]:
        raise UserError("COMMAND is missing after --: hvdtrain launch -np N -- COMMAND ARGUMENTS")
    target, path = line.rest[0], Path(line.rest[0])
    if target.startswith("-"):
        raise UserError(f"{target} after -- is not a program: {line.show('--', 'python', *line.rest)}")
    if "/" not in target and find_executable(target):
        return
    if path.is_dir():
        refuse_folder(line)
    if path.is_file() and ("/" not in target or not os.access(path, os.X_OK)):
        if "/" in target:
            raise CommandError(f"{target!r} is not executable; to start it: {show_runner(line)}", EXIT_NOT_EXECUTABLE)
        raise UserError(f"{target!r} is not found on PATH; to start it: {show_runner(line)}")
    refuse_shell_line(line)


def find_executable(name: str) -> str | None:
    """Return the program of a name on the PATH of the ranks: this Python's folder comes first."""
    return shutil.which(name, path=os.pathsep.join([str(bin_folder()), os.environ.get("PATH", os.defpath)]))


def refuse_folder(line: LaunchLine) -> NoReturn:
    """Raise UserError for a folder, with the line to write if Python can run it."""
    target, *args = line.rest
    if (Path(target) / "__main__.py").is_file():
        raise UserError(f"{target!r} is a folder; as a program: {line.show('--', 'python', target, *args)}")
    raise UserError(f"{target!r} is a folder: name a file in it")


def refuse_shell_line(line: LaunchLine) -> None:
    """Raise UserError if the first word is a line of a shell, such as 'python train.py', or an assignment."""
    target, *args = line.rest
    if ASSIGNMENT.match(target):
        raise UserError(f"{target!r} is not a program: {line.show('--', 'env', *line.rest)}")
    if " " not in target.strip() or Path(target).exists():
        return
    if SHELL_SYNTAX.search(target) or "'" in target or '"' in target:
        words = ["bash", "-c", " ".join([target, *map(shlex.quote, args)])]
    else:
        words = [*target.split(), *args]
    raise UserError(f"{target!r} is a line, not the name of a program: {line.show('--', *words)}")


def show_runner(line: LaunchLine) -> str:
    """Return the line that starts an existing file as a program."""
    target, *args = line.rest
    path = Path(target)
    word = target if "/" in target else f"./{target}"
    with path.open("rb") as file:
        first = file.readline(200)
    if path.suffix == ".ipynb":
        script = str(path.with_suffix(".py"))
        return f"jupyter nbconvert --to script {shlex.quote(target)}, then {line.show(script, *args)}"
    if path.suffix in (".py", ".pyw", ".pyc", ".pyz"):
        return line.show("--", "python", target, *args)
    if os.access(path, os.X_OK):
        return line.show("--", word, *args)
    if first.startswith(b"#!"):
        return line.show("--", "python" if b"python" in first else "bash", word, *args)
    if path.suffix == ".sh":
        return line.show("--", "bash", word, *args)
    return f"chmod +x {shlex.quote(target)}, then {line.show('--', word, *args)}"


def suggest_file(path: Path) -> str:
    """Return the end of a message that there is no such file: a Python file of the folder with a name like it."""
    try:
        names = [other.name for other in path.parent.glob("*.py")]
    except OSError:
        return ""
    return suggest_nearest(path.name, names, list_all=False)
