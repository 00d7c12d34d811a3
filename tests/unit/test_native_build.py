"""Building Horovod: short errors, a cache that is intact or empty, and the name of what is missing."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from hvdtrain.cli.main import main
from hvdtrain.native import build, cache, installed, log, make, source
from hvdtrain.native.installed import InstalledHorovod
from hvdtrain.native.make import BuildOptions
from hvdtrain.native.mpi import Mpi
from hvdtrain.native.patches import read_revision
from hvdtrain.native.plan import Plan
from hvdtrain.native.torchinfo import Torch, TorchBuild
from hvdtrain.system.errors import EXIT_USER_ERROR, RunError, UserError
from hvdtrain.system.progress import print_stage_lines

# From real builds: shortened, with the paths cut.
COMPILER_LOG = """\
-- Performing Test CMAKE_HAVE_LIBC_PTHREAD - Failed
[33/84] Building CXX object third_party/gloo/gloo/CMakeFiles/gloo.dir/transport/tcp/error.cc.o
gloo/common/logging.h:124:28: warning: comparison of integer expressions of different signedness [-Wsign-compare]
[81/84] Building CXX object horovod/torch/CMakeFiles/pytorch.dir/adapter_v2.cc.o
FAILED: [code=1] horovod/torch/CMakeFiles/pytorch.dir/adapter_v2.cc.o
/usr/bin/c++ -DEIGEN_MPL2_ONLY=1 -DHAVE_GLOO=1 -std=c++14 -fPIC -o adapter_v2.cc.o -c adapter_v2.cc
In file included from torch/include/torch/extension.h:6,
                 from horovod/torch/adapter_v2.h:19,
torch/all.h:5:2: error: #error C++20 or later compatible compiler is required to use PyTorch.
    5 | #error C++20 or later compatible compiler is required to use PyTorch.
      |  ^~~~~
In file included from torch/types.h:4,
ATen/ATen.h:5:2: error: #error C++20 or later compatible compiler is required to use ATen.
ninja: build stopped: subcommand failed.
Traceback (most recent call last):
subprocess.CalledProcessError: Command '['cmake', '--build', '.']' returned non-zero exit status 1.
"""
CMAKE_LOG = """\
-- Found Pytorch: 2.14.1+cu130 (found suitable version "2.14.1+cu130", minimum required is "1.5.0")
CMake Error: The following variables are used in this project, but they are set to NOTFOUND.
Please set them or make sure they are set and tested correctly in the CMake files:
FOUND_LIB_cudart
    linked by target "pytorch" in directory horovod/torch

-- Generating done (0.1s)
subprocess.CalledProcessError: Command '['cmake', '.']' returned non-zero exit status 1.
"""


def test_first_compiler_error() -> None:
    error = log.first_error(COMPILER_LOG).splitlines()
    assert error[0].startswith("torch/all.h:5:2: error: #error C++20 or later")
    assert len(error) <= log.ERROR_LINES and "ATen.h:5:2" not in "\n".join(error)


def test_first_cmake_error() -> None:
    error = log.first_error(CMAKE_LOG).splitlines()
    assert error[0].startswith("CMake Error") and "FOUND_LIB_cudart" in error and len(error) == 4


def test_cmake_error_of_several_paragraphs() -> None:
    text = 'CMake Error at X.cmake:71 (message):\n  The C++ compiler\n\n    "false"\n\n  is not able\n\n\n-- more\n'
    assert log.first_error(text).splitlines()[1:] == ["  The C++ compiler", '    "false"', "  is not able"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("x\nc++: fatal error: Killed signal terminated program cc1plus\n", "c++: fatal error"),
        ("kernels.cu(12): error: identifier is undefined\n", "kernels.cu(12): error"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_75'\n", "nvcc fatal"),
        ("/usr/bin/ld: a.o: undefined reference to `MPI_Init'\n", "/usr/bin/ld"),
        ("a warning: error handling\nERROR: Could not find a version\n", "ERROR: Could not find"),
        ("one\ntwo\n", "one\ntwo"),
        ("", "no output"),
    ],
)
def test_first_error_of_other_kinds(text: str, first: str) -> None:
    assert log.first_error(text).startswith(first)


def run(tmp_path: Path, script: str, timeout: float = 30) -> list[str]:
    """Run a Python script as a step and return the lines that were passed on."""
    lines_seen: list[str] = []
    command = [sys.executable, "-c", script]
    log_path = tmp_path / "log"
    log.run_logged(log.BuildStep("the step", command, os.environ, tmp_path, timeout), log_path, lines_seen.append)
    return lines_seen


def test_output_of_a_step_is_logged_and_passed_on(tmp_path: Path) -> None:
    assert run(tmp_path, "print('a'); import sys; print('b', file=sys.stderr)") == ["a\n", "b\n"]
    assert (tmp_path / "log").read_text().endswith("a\nb\n")


def test_a_failed_step_raises_its_first_error_and_the_logs_path(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)the step failed:\nx.cc:1:2: error: no\nlog: .*/log$"):
        run(tmp_path, "print('x.cc:1:2: error: no'); raise SystemExit(1)")


def test_a_step_is_killed_at_its_time_limit(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="longer than 1 s"):
        run(tmp_path, "import time; print('here', flush=True); time.sleep(60)", timeout=1)


def test_a_stored_wheel_is_complete_or_absent(tmp_path: Path) -> None:
    wheel = tmp_path / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"wheel")
    folder = tmp_path / "wheels" / "key"
    stored = cache.store_wheel(wheel, folder)
    assert cache.find_whole_wheel(folder) == (stored, "") and stored.read_bytes() == b"wheel"
    assert sorted(path.name for path in folder.iterdir()) == [wheel.name, f"{wheel.name}.sha256"]
    with pytest.raises(FileNotFoundError):
        cache.store_wheel(tmp_path / "horovod-none.whl", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


def test_wheel_folder_follows_xdg_cache_home_or_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.wheel_folder() == tmp_path / "hvdtrain" / "wheels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.wheel_folder() == tmp_path / ".cache" / "hvdtrain" / "wheels"


def test_another_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "horovod-0.28.1.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(RunError, match=r"has SHA-256 [0-9a-f]{64}, expected 92a43f5a"):
        source.unpack_source(archive, tmp_path)


def test_build_without_a_compiler_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit) as left:
        main(["horovod", "build", "--force", "--wheel-dir", str(tmp_path / "wheels")])
    assert left.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err == (
        "hvdtrain: error: no C++ compiler found (c++, g++ or clang++): apt-get install g++, or dnf install gcc-c++\n"
    )


def test_cxx_chooses_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", sys.executable)
    assert build.find_compiler() == sys.executable
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="CXX=no-such-compiler is not a command"):
        build.find_compiler()


CPU = Plan(Torch("2.13.0", None, "", "20"), TorchBuild((), True), None, "", None, None, "", (), "-mavx")


def test_environment_of_a_plain_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GPU_OPERATIONS", "NCCL")
    monkeypatch.setenv("CMAKE_ARGS", "-DX=1")
    env = build.build_environment(CPU, tmp_path, "c++", 3)
    assert "HOROVOD_GPU_OPERATIONS" not in env and "CMAKE_ARGS" not in env
    assert env["HOROVOD_WITHOUT_MPI"] == "1" and env["CMAKE_BUILD_PARALLEL_LEVEL"] == "3"
    assert env["HOROVOD_BUILD_ARCH_FLAGS"] == "-mavx" and env["PATH"].startswith(f"{tmp_path}/tools/bin{os.pathsep}")


def test_pip_toolkit_gets_the_links_that_cmake_looks_for(tmp_path: Path) -> None:
    home = tmp_path / "cu13"
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    (home / "bin" / "nvcc").touch()
    (home / "bin" / "ptxas").touch()
    (home / "lib" / "libcudart.so.13").touch()
    folder = source.link_cuda(source.Toolkit(home, "13.0.1", ()), tmp_path / "cuda")
    assert (folder / "lib64" / "libcudart.so").exists() and (folder / "bin" / "ptxas").exists()
    assert not (folder / "bin" / "nvcc").is_symlink()
    (home / "lib" / "libcudart.so").touch()
    assert source.link_cuda(source.Toolkit(home, "13.0.1", ()), tmp_path / "other") == home


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    report = print_stage_lines()
    report("fetching", 0)
    for percent in range(101):
        report("compiling", percent)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in shown] == [
        "fetching",
        "compiling",
        *(f"compiling {percent} %" for percent in range(20, 101, 20)),
    ]


def test_ninja_lines_report_the_percentage_compiled() -> None:
    seen: list[int] = []
    for line in ["[21/84] Building CXX", "-- Found MPI", "[84/84] Linking"]:
        build.report_compiling(line, lambda stage, percent: seen.append(percent))
    assert seen == [25, 100]


def fake_installed(
    torch: str | None, has_torch: bool = True, signed: bool = True, revision: int = 0
) -> InstalledHorovod:
    """Return a Horovod that was built for `torch`; for None, one that hvdtrain has not built."""
    record = None
    if torch:
        patches = {installed.SIGNED_PATCH: "0"} if signed else {}
        record = dataclasses.replace(
            CPU.make_record(), torch=torch, patches=patches, revision=revision or read_revision()[0]
        )
    return InstalledHorovod("0.28.1", Path("horovod"), record, has_torch)


NOW = Torch("2.14.1+cu130", "13.0", "", "20")


@pytest.mark.parametrize(
    ("horovod", "message"),
    [
        (None, "Horovod is not installed: run `hvdtrain horovod build`"),
        (
            fake_installed("2.13.0+cu130"),
            "Horovod 0.28.1 is built for torch 2.13.0 but torch 2.14.1 is installed: run `hvdtrain horovod build`",
        ),
        (
            fake_installed("2.14.1+cpu"),
            "Horovod 0.28.1 is built for torch 2.14.1+cpu but torch 2.14.1+cu130 is installed: "
            "run `hvdtrain horovod build`",
        ),
        (
            fake_installed(None, has_torch=False),
            "Horovod 0.28.1 is installed without its torch extension: run `hvdtrain horovod build`",
        ),
        (
            fake_installed("2.14.1+cu130", signed=False),
            "Horovod 0.28.1 was built by an older hvdtrain; its servers answer anyone: run `hvdtrain horovod build`",
        ),
        (
            fake_installed("2.14.1+cu130", revision=1000),
            "Horovod 0.28.1 was built by another hvdtrain, with revision 1000 of its patches; "
            f"expected revision {read_revision()[0]}: run `hvdtrain horovod build`",
        ),
    ],
)
def test_require_names_the_mismatch_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch, horovod: InstalledHorovod | None, message: str
) -> None:
    monkeypatch.setattr(installed, "find_horovod", lambda: horovod)
    monkeypatch.setattr(installed, "require_torch", lambda: NOW)
    with pytest.raises(UserError) as wrong:
        installed.require_horovod()
    assert str(wrong.value) == message


@pytest.mark.parametrize("horovod", [fake_installed("2.14.1+cu130"), fake_installed(None)])
def test_require_returns_a_matching_horovod(monkeypatch: pytest.MonkeyPatch, horovod: InstalledHorovod) -> None:
    monkeypatch.setattr(installed, "find_horovod", lambda: horovod)
    monkeypatch.setattr(installed, "require_torch", lambda: NOW)
    assert installed.require_horovod() == horovod


@pytest.mark.parametrize("horovod", [fake_installed("2.14.1+cu130", signed=False), fake_installed(None)])
def test_launch_needs_a_horovod_that_keeps_secrets(monkeypatch: pytest.MonkeyPatch, horovod: InstalledHorovod) -> None:
    monkeypatch.setattr(installed, "find_horovod", lambda: horovod)
    with pytest.raises(UserError, match=r"horovodrun shows the secret of a run to all users: run `hvdtrain horovod"):
        installed.require_signed()
    for fine in (None, fake_installed("2.14.1+cu130")):
        monkeypatch.setattr(installed, "find_horovod", lambda fine=fine: fine)
        installed.require_signed()


@pytest.mark.parametrize(("force", "built", "installs"), [(False, 0, 0), (True, 1, 1)])
def test_nothing_to_do_when_the_key_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, force: bool, built: int, installs: int
) -> None:
    did: list[str] = []
    monkeypatch.setattr(make, "make_plan", lambda without, mpi: CPU)
    monkeypatch.setattr(
        installed, "find_horovod", lambda: InstalledHorovod("0.28.1", Path("horovod"), CPU.make_record(), True)
    )
    monkeypatch.setattr(build, "build_wheel", lambda *_: did.append("build"))
    monkeypatch.setattr(build, "install_wheel", lambda _: did.append("install"))
    make.provide_horovod(BuildOptions(wheel_dir=tmp_path, force=force))
    assert (did.count("build"), did.count("install")) == (built, installs)


def test_a_wheel_in_the_cache_is_only_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    did: list[Path] = []
    monkeypatch.setattr(make, "make_plan", lambda without, mpi: CPU)
    monkeypatch.setattr(installed, "find_horovod", lambda: None)
    monkeypatch.setattr(build, "install_wheel", did.append)
    built = tmp_path / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    built.write_bytes(b"wheel")
    wheel = cache.store_wheel(built, tmp_path / CPU.make_record().cache_key())
    make.provide_horovod(BuildOptions(wheel_dir=tmp_path))
    assert did == [wheel]


@pytest.mark.parametrize("damage", ["changed", "no checksum", "empty checksum"])
def test_a_damaged_wheel_is_built_again(
    damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    did: list[str] = []
    monkeypatch.setattr(make, "make_plan", lambda without, mpi: CPU)
    monkeypatch.setattr(installed, "find_horovod", lambda: None)
    monkeypatch.setattr(build, "build_wheel", lambda *_: did.append("build"))
    monkeypatch.setattr(build, "install_wheel", lambda _: did.append("install"))
    built = tmp_path / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    built.write_bytes(b"wheel")
    wheel = cache.store_wheel(built, tmp_path / CPU.make_record().cache_key())
    if damage == "changed":
        wheel.write_bytes(b"whee1")
    elif damage == "no checksum":
        cache.checksum_path(wheel).unlink()
    else:
        cache.checksum_path(wheel).write_bytes(b"\xff")
    make.provide_horovod(BuildOptions(wheel_dir=tmp_path))
    assert did == ["build", "install"]
    reason = "is damaged: SHA-256 " if damage == "changed" else "has no checksum"
    assert f"{wheel} {reason}" in capsys.readouterr().out


def test_a_wheel_that_another_user_may_have_written_is_refused(tmp_path: Path) -> None:
    built = tmp_path / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl"
    built.write_bytes(b"wheel")
    wheel = cache.store_wheel(built, tmp_path / "key")
    for path in (wheel, wheel.parent):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        with pytest.raises(UserError, match=rf"{path} can be changed by every user; expected only user"):
            cache.find_whole_wheel(tmp_path / "key")
        path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(wheel, 4321, -1)
        with pytest.raises(UserError, match=rf"{wheel} belongs to user 4321; expected only user 0"):
            cache.find_whole_wheel(tmp_path / "key")


def test_run_path_has_one_folder_of_a_system_mpi(tmp_path: Path) -> None:
    for name in ("lib", "lib64"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "libmpi.so.40").touch()
    mpi = Mpi(tmp_path, "Open MPI 5.0.11", tmp_path / "bin" / "mpirun")
    made = Plan(CPU.torch, CPU.torch_build, mpi, "", None, None, "", (), "")
    assert made.run_path() == [str(tmp_path / "lib")]
    assert made.make_record().rpath == (str(tmp_path / "lib"),)
