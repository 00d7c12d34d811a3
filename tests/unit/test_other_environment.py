"""Building Horovod for another torch or Python: which are meant, and what the other environment gets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hvdtrain.cli.main import main
from hvdtrain.native.make import BuildOptions
from hvdtrain.native.other_environment import (
    BuildTarget,
    ask_python_version,
    find_python,
    list_requirements,
    make_environment_variables,
)
from hvdtrain.system.errors import EXIT_USER_ERROR, UserError


@pytest.mark.parametrize(
    ("version", "requirement"),
    [("2.10", "torch==2.10.*"), ("2.10.0", "torch==2.10.0"), ("2.10.0+cu126", "torch==2.10.0+cu126")],
)
def test_the_version_of_torch_is_what_pip_installs(version: str, requirement: str) -> None:
    assert BuildTarget(torch=version).torch_requirement() == requirement


def test_torch_is_that_of_this_environment_by_default() -> None:
    import torch

    assert BuildTarget(python="3.12").torch_requirement() == f"torch=={torch.__version__.partition('+')[0]}"


@pytest.mark.parametrize("version", ["newest", "2", "2.10; rm -rf x", ">=2.10", ""])
def test_what_is_not_a_version_of_torch_is_refused(version: str) -> None:
    with pytest.raises(UserError, match="expected a version, such as"):
        BuildTarget(torch=version).torch_requirement()


def test_this_python_is_found_by_version_and_by_path() -> None:
    version = ".".join(map(str, sys.version_info[:2]))
    assert ask_python_version(find_python(version)) is not None
    assert find_python(sys.executable) == Path(sys.executable)
    assert find_python(None) == Path(sys.executable)


def test_a_python_that_does_not_exist_is_refused_before_anything_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["horovod", "build", "--python", "3.99", "--wheel-dir", str(tmp_path / "wheels")])
    assert left.value.code == EXIT_USER_ERROR
    assert "--python 3.99: no such Python found" in capsys.readouterr().err
    assert not (tmp_path / "wheels").exists()


def make_program(path: Path, version: str) -> Path:
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def test_a_program_named_like_another_version_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_program(tmp_path / "python3.77", "3.76.1")  # as a shim or a link that is wrong
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match="no such Python"):
        find_python("3.77")
    make_program(tmp_path / "python3.77", "3.77.1")
    assert find_python("3.77") == tmp_path / "python3.77"
    assert find_python("3.77.1") == tmp_path / "python3.77"
    with pytest.raises(UserError, match="no such Python"):
        find_python("3.77.2")


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = make_program(tmp_path / "python", "3.9.18")
    with pytest.raises(UserError, match=r"is 3\.9\.18, and hvdtrain needs 3\.10"):
        find_python(str(old))


def test_the_other_environment_gets_what_hvdtrain_needs_but_not_this_torch() -> None:
    names = [text.partition(">")[0].partition("=")[0].strip() for text in list_requirements()]
    assert {"click", "numpy", "packaging", "psutil", "rich"} <= set(names)
    assert not {"torch", "torchvision", "pytest"} & set(names)


def test_the_other_environment_finds_no_package_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    env = make_environment_variables(tmp_path, tmp_path / "venv" / "bin")
    assert [path.name for path in Path(env["PYTHONPATH"]).iterdir()] == ["hvdtrain"]
    folders = env["PATH"].split(os.pathsep)
    assert folders[0] == str(tmp_path / "venv" / "bin") and str(Path(sys.executable).parent) not in folders
    assert "VIRTUAL_ENV" not in env


def test_options_of_a_build_survive_the_way_to_the_other_environment(tmp_path: Path) -> None:
    options = BuildOptions(without=("nccl", "mpi"), mpi="none", jobs=3, force=True)
    assert options.command_arguments(tmp_path) == [
        *("--jobs=3", f"--wheel-dir={tmp_path}", "--without=nccl", "--without=mpi", "--mpi=none", "--force"),
    ]
