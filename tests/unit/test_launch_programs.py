"""`hvdtrain launch` with programs: what is handed over, and the one line for everything that is not understood."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.cli.main import main
from hvdtrain.launch.options import ElasticOptions, LaunchOptions
from hvdtrain.launch.program import Program

MARK = "import pathlib\npathlib.Path({mark!r}).touch()\n"
RECIPE = "from hvdtrain.torch import Recipe\nclass Mine(Recipe): pass\n"
UNCLEAR = "from acme import Base\nclass Mine(Base): pass\n"
PYTHON = sys.executable


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Program, LaunchOptions, Any]]:
    """What launch hands over, in a folder with files of all kinds, none of which may be run."""
    calls: list[tuple[Program, LaunchOptions, Any]] = []

    def launch_program(program: Program, options: LaunchOptions, elastic: ElasticOptions | None) -> int:
        calls.append((program, options, elastic))
        return 7

    monkeypatch.setattr("hvdtrain.cli.launch.launch_program", launch_program)
    monkeypatch.chdir(tmp_path)
    mark = MARK.format(mark=str(tmp_path / "ran"))
    texts = {"train.py": "", "mine.py": RECIPE, "unclear.py": UNCLEAR, "my file.py": "", "folder/__main__.py": ""}
    texts |= {"broken.py": "x = (\n", "empty/readme": "", "recipes/scripted.py": ""}
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(mark + text)
    for name, text, mode in (
        ("train.sh", "#!/bin/bash\n", 0o755),
        ("job.sh", "echo\n", 0o644),
        ("tool", "#!/usr/bin/env python3\n", 0o644),
        ("a.out", "\x7fELF", 0o755),
        ("data.bin", "\x7fELF", 0o644),
        ("book.ipynb", "{}", 0o644),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    return calls


def launch(line: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["launch", *shlex.split(line)])
    assert isinstance(left.value.code, int) and not Path("ran").exists()
    return left.value.code


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("-np 2 train.py", [PYTHON, "train.py"]),
        ("-np 2 ./train.py --lr 0.1", [PYTHON, "./train.py", "--lr", "0.1"]),
        ("-np 2 train.py --epochs 3 -np 4 --help -h --resume --print-config", "as it is"),
        ("-np 2 train.py -- --dry-run -H a:2 --elastic", "as it is"),
        ("-np 2 train.py '' 'a b' '$HOME' '~/x' '*' 'a;b' \"it's\" 'new\nline' --x=", "as it is"),
        ("-np 2 'my file.py' x", [PYTHON, "my file.py", "x"]),
        ("-np 2 -- python train.py -np 3", ["python", "train.py", "-np", "3"]),
        ("-np 2 -- python -m pkg --lr 1 -- x", ["python", "-m", "pkg", "--lr", "1", "--", "x"]),
        ("-np 2 -- ./train.sh --resume", ["./train.sh", "--resume"]),
        ("-np 2 -- bash -c 'echo $RANK | cat' 'a b'", ["bash", "-c", "echo $RANK | cat", "a b"]),
        ("-np 2 -- ./a.out", ["./a.out"]),
        ("-np 2 -- not_on_this_host x", ["not_on_this_host", "x"]),
        ("-np 2 -- mine.sh/x --", ["mine.sh/x", "--"]),
        ("-np 2 -- python mine.py", ["python", "mine.py"]),
        ("-np 2 -- python unclear.py", ["python", "unclear.py"]),
        ("-np 2 -- hvdtrain train digits", ["hvdtrain", "train", "digits"]),
    ],
)
def test_a_program_is_handed_over_as_it_is(started: list[Any], line: str, command: list[str] | str) -> None:
    assert launch(line) == 7
    ((program, options, elastic),) = started
    expected = [PYTHON, *shlex.split(line)[2:]] if isinstance(command, str) else command
    assert list(program.command) == expected and not program.gpu_per_rank and elastic is None
    assert options.num_ranks == 2


def test_options_of_launch_hold_for_programs(started: list[Any]) -> None:
    hosts = "--elastic --min-np 2 --max-np 4 --discovery ./train.sh --relaunch 3 --grace 5 --gpu-per-rank --nic lo"
    assert launch(f"{hosts} --env HOME --dry-run train.py --grace 9") == 7
    assert launch("-H a:1,b:1 --relaunch 2 --launcher mpirun -- ./a.out") == 7
    (program, options, elastic), (fixed, over, none) = started
    assert program == Program(command=[PYTHON, "train.py", "--grace", "9"], gpu_per_rank=True, relaunches=3)
    assert elastic == ElasticOptions(min_np=2, max_np=4, discovery=Path("train.sh"), relaunches=3)
    assert (options.grace, options.nic, options.forward_env, options.dry_run) == (5, "lo", ("HOME",), True)
    assert (fixed.relaunches, over.source.hosts, over.launcher.name, none) == (2, "a:1,b:1", "mpirun", None)


NO_RECIPE = (
    "defines no recipe, and was not run: subclass hvdtrain.torch.Recipe, hvdtrain.jax.Recipe or hvdtrain.keras.Recipe, "
    "or start it as a program: "
)
OTHER_FILE = "is neither a recipe nor a Python file; as a program: "
OWN_OPTION = "is a program: a program's own options come after it: hvdtrain launch -np 2"
BOTH = (
    "unclear.py is not run: its class Mine may be a recipe, as far as can be seen without running it: `hvdtrain launch "
    "unclear.py:Mine` starts it as a recipe, `hvdtrain launch -- python unclear.py` as a program"
)
NO_OPTION = "before RECIPE is neither a launch option nor a run option; "


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("-np 2 unclear.py --lr 1", BOTH),
        ("-np 2 --dry-run unclear.py", BOTH),
        ("-np 2 broken.py", "broken.py cannot be imported: SyntaxError: '(' was never closed (line 3)"),
        ("-np 2 trian.py", "no file 'trian.py'; did you mean 'train.py'?"),
        ("-np 2 no/such.py", "no file 'no/such.py'"),
        ("-np 2 ./no_such", "no file './no_such'"),
        (
            "-np 2 train --lr 1",
            "no recipe 'train'; to start the file of this name: hvdtrain launch -np 2 train.py --lr 1",
        ),
        (
            "-np 2 not_on_this_host x",
            "no recipe 'not_on_this_host' (`hvdtrain list` shows those found), nor a program; if other hosts have such "
            "a program: hvdtrain launch -np 2 -- not_on_this_host x",
        ),
        ("-np 2 digitz", "no recipe 'digitz'; did you mean 'digits'?"),
        (
            "-np 2 scripted",
            f"PWD/recipes/scripted.py {NO_RECIPE}hvdtrain launch PWD/recipes/scripted.py",
        ),
        (
            "-np 2 train.py:Mine",
            f"train.py {NO_RECIPE}hvdtrain launch train.py",
        ),
        (
            "-np 2 python train.py --lr 1",
            "no recipe 'python'; to start the program of this name: hvdtrain launch -np 2 -- python train.py --lr 1",
        ),
        (
            "bash -c 'echo 1'",
            "no recipe 'bash'; to start the program of this name: hvdtrain launch -- bash -c 'echo 1'",
        ),
        ("-np 2 -m pkg --lr 1", "-m is an option of Python: hvdtrain launch -np 2 -- python -m pkg --lr 1"),
        ("-np 2 -c 'a b'", "-c is an option of Python: hvdtrain launch -np 2 -- python -c 'a b'"),
        ("-np 2 -- -m pkg", "-m after -- is not a program: hvdtrain launch -np 2 -- python -m pkg"),
        ("-np 2 --", "COMMAND is missing after --: hvdtrain launch -np N -- COMMAND ARGUMENTS"),
        ("-np 2 -- ''", "COMMAND is missing after --: hvdtrain launch -np N -- COMMAND ARGUMENTS"),
        (
            "-np 2 ./train.sh a",
            f"'./train.sh' {OTHER_FILE}hvdtrain launch -np 2 -- ./train.sh a",
        ),
        (
            "train.sh",
            f"'train.sh' {OTHER_FILE}hvdtrain launch -- ./train.sh",
        ),
        (
            "job.sh",
            f"'job.sh' {OTHER_FILE}hvdtrain launch -- bash ./job.sh",
        ),
        (
            "./tool",
            f"'./tool' {OTHER_FILE}hvdtrain launch -- python ./tool",
        ),
        ("./a.out", f"'./a.out' {OTHER_FILE}hvdtrain launch -- ./a.out"),
        (
            "data.bin",
            f"'data.bin' {OTHER_FILE}chmod +x data.bin, then hvdtrain launch -- ./data.bin",
        ),
        (
            "book.ipynb",
            f"'book.ipynb' {OTHER_FILE}jupyter nbconvert --to script book.ipynb, then hvdtrain launch book.py",
        ),
        ("-- train.sh x", "'train.sh' is not found on PATH; to start it: hvdtrain launch -- ./train.sh x"),
        ("-- train.py x", "'train.py' is not found on PATH; to start it: hvdtrain launch -- python train.py x"),
        ("-- ./train.py", "'./train.py' is not executable; to start it: hvdtrain launch -- python ./train.py"),
        ("-- ./job.sh", "'./job.sh' is not executable; to start it: hvdtrain launch -- bash ./job.sh"),
        ("folder", "'folder' is a folder; as a program: hvdtrain launch -- python folder"),
        ("-- ./folder x", "'./folder' is a folder; as a program: hvdtrain launch -- python ./folder x"),
        ("empty/", "'empty/' is a folder: name a file in it"),
        (
            "-np 2 -- 'python train.py --lr 1'",
            "'python train.py --lr 1' is a line, not the name of a program: hvdtrain launch -np 2 -- python train.py "
            "--lr 1",
        ),
        (
            "'python train.py > out'",
            "'python train.py > out' is a line, not the name of a program: hvdtrain launch -- bash -c 'python train.py "
            "> out'",
        ),
        ("-- A=1 python x.py", "'A=1' is not a program: hvdtrain launch -- env A=1 python x.py"),
        (
            "torchrun --nproc_per_node 2 train.py",
            "'torchrun' starts ranks itself, and `hvdtrain launch` takes its place: hvdtrain launch -np N script.py "
            "ARGUMENTS; on the options of both: docs/programs.md",
        ),
        ("--nproc_per_node 2 train.py", f"--nproc_per_node {NO_OPTION}launch has -np for it: hvdtrain launch --help"),
        ("--nproc-per-node=2 train.py", f"--nproc-per-node {NO_OPTION}launch has -np for it: hvdtrain launch --help"),
        ("--module pkg", f"--module {NO_OPTION}launch has -- COMMAND for it: hvdtrain launch --help"),
        ("-np 2 -hostfile f x", f"-hostfile {NO_OPTION}launch has --hostfile for it: hvdtrain launch --help"),
        ("-n 2 train.py", f"-n {NO_OPTION}launch has -np for it: hvdtrain launch --help"),
        ("--hosts a:2 train.py", f"--hosts {NO_OPTION}launch has -H for it: hvdtrain launch --help"),
        (
            "-np 2 --resume train.py --lr 1",
            f"--resume is an option of recipes, and train.py {OWN_OPTION} train.py --lr 1 --resume",
        ),
        (
            "-np 2 --epochs 3 -- python train.py",
            f"--epochs is an option of recipes, and python {OWN_OPTION} -- python train.py --epochs 3",
        ),
        ("train.py -np 2 --lr 1", "-np goes before train.py: hvdtrain launch -np 2 train.py --lr 1"),
        (
            "-np 2 --gpu-per-rank digits",
            "--gpu-per-rank is for programs; a recipe chooses its device itself (--device)",
        ),
        ("-np 2 --relaunch 2 digits", "--relaunch 2 goes with --elastic or with a program"),
        ("-np 2 --min-np 1 train.py", "--min-np 1 goes with --elastic"),
        ("-np 2 --discovery ./train.sh -- ./a.out", "--discovery train.sh goes with --elastic"),
    ],
)
def test_what_is_not_understood_is_one_line(
    started: list[Any], capsys: pytest.CaptureFixture[str], line: str, error: str
) -> None:
    assert launch(line) == (126 if "is not executable" in error else 2)
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"hvdtrain: error: {error.replace('PWD', str(Path.cwd()))}"
    assert not started and "Traceback" not in err


@pytest.mark.parametrize("line", ["mine.py", "./mine.py", "mine.py:Mine", "unclear.py:Mine", "digits", "digits:Digits"])
def test_recipes_are_not_programs(started: list[Any], monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    launched: list[Any] = []
    monkeypatch.setattr("hvdtrain.cli.launch.launch_ranks", lambda args, *rest: launched.append(args) or 0)
    assert launch(f"-np 2 --epochs 1 {line} --lr 2") == 0
    assert launched == [["train", line, "--epochs", "1", "--lr", "2"]] and not started


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["evaluate", "train.py"], "train.py is a file; expected RUN_DIR, the folder of a run"),
        (["predict", "train.py", "--split", "eval", "--output", "x.npz"], "train.py is a file; expected RUN_DIR"),
        (["list", "train.py"], "train.py defines no recipe, and was not run"),
        (["train", "train.py", "--lr", "1"], "train.py defines no recipe, and was not run"),
        (["train", "--resume", "train.py"], "train.py defines no recipe, and was not run"),
    ],
)
def test_other_commands_name_launch(
    started: list[Any], capsys: pytest.CaptureFixture[str], line: list[str], text: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(line)
    (error,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and error.startswith(f"hvdtrain: error: {text}")
    assert error.endswith(": hvdtrain launch train.py") and not Path("ran").exists()


def test_list_shows_the_recipes_of_files(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["list", "digits", "mine.py", "./mine.py:Mine"])
    assert left.value.code == 0 and not Path("ran").exists()
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["vision:", "digits", "other:", "mine.py", "./mine.py"]


def test_help_says_how_to_start_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", "--help"])
    text = capsys.readouterr().out
    for part in ("hvdtrain launch [LAUNCH OPTIONS] SCRIPT.py [ARGUMENTS]", "[LAUNCH OPTIONS] -- COMMAND [ARGUMENTS]"):
        assert part in text
    for name in ("WORLD_SIZE", "MASTER_ADDR", "JAX_COORDINATOR_ADDRESS", "TF_CONFIG", "--gpu-per-rank", "128+N", "75"):
        assert name in text


@pytest.mark.parametrize(
    ("text", "controller", "warns"),
    [
        ("from mpi4py import MPI\n", "gloo", True),
        ("def main():\n    import mpi4py.MPI\n", "gloo", True),
        ("from mpi4py import MPI\n", "mpi", False),
        ("import torch  # not mpi4py\n", "gloo", False),
        ("import mpi4pyx\n", "gloo", False),
    ],
)
def test_ranks_that_would_be_alone_in_their_mpi_world_are_warned_of(
    tmp_path: Path, text: str, controller: str, warns: bool
) -> None:
    script = tmp_path / "solve.py"
    script.write_text(text)
    for command in ([sys.executable, str(script)], ["python", "-u", str(script), "--lr", "1"]):
        warning = Program(command=command).describe_lone_ranks(controller)
        assert ("--launcher mpirun" in warning) == warns and ("solve.py imports mpi4py" in warning) == warns
    assert not Program(command=["./solver", "--file", "in.txt"]).describe_lone_ranks(controller)
