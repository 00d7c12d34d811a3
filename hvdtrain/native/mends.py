"""The changes to Horovod's released source without which it does not build, or not work, today."""

from __future__ import annotations

from collections.abc import Sequence

from hvdtrain.native.cycle import for_the_cycle
from hvdtrain.native.elastic import for_elastic
from hvdtrain.native.mend import Mend


def mends(standard: str, *, nccl: bool, rpath: Sequence[str]) -> list[Mend]:
    """The changes for one build.

    Args:
        standard: the C++ standard of torch's headers, such as "20".
        nccl: whether the GPU parts are built.
        rpath: where the built library is to look for MPI and NCCL.
    """
    changes = for_every_build(standard, rpath)
    return changes if nccl else changes + for_no_cuda()


def for_every_build(standard: str, rpath: Sequence[str]) -> list[Mend]:
    """What every build needs, and what makes it quick."""
    torch_cmake = "horovod/torch/CMakeLists.txt"
    includes = "#include <torch/extension.h>\n#include <torch/torch.h>\n"
    return [
        # torch's headers need a newer C++ than Horovod asks for.
        Mend("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", f"set(CMAKE_CXX_STANDARD {standard})"),
        Mend(torch_cmake, "set(CMAKE_CXX_STANDARD 14)", f"set(CMAKE_CXX_STANDARD {standard})"),
        # Gloo's per-process-set contexts take the chosen interface, not the one the hostname resolves to: on Debian
        # that is 127.0.1.1, where no other host answers.
        Mend(
            "horovod/common/gloo/gloo_context.cc",
            "  attr device_attr;\n"
            "  device_attr.iface = gloo_iface_;\n"
            "  device_attr.ai_family = AF_UNSPEC;\n"
            "  auto dev = CreateDevice(device_attr);\n\n"
            "  global_ctx = global_context.ctx;\n",
            "  gloo_iface_ = global_context.gloo_iface_;\n"
            "  attr device_attr;\n"
            "  device_attr.iface = gloo_iface_;\n"
            "  device_attr.ai_family = AF_UNSPEC;\n"
            "  auto dev = CreateDevice(device_attr);\n\n"
            "  global_ctx = global_context.ctx;\n",
        ),
        *for_the_cycle(),
        *for_elastic(),
        *for_gloo(),
        # Python 3.12 has no distutils.
        Mend(
            torch_cmake,
            "from distutils.sysconfig import get_python_inc; print(get_python_inc())",
            "from sysconfig import get_path; print(get_path('include'))",
        ),
        Mend(
            "horovod/runner/js_run.py",
            "from distutils.spawn import find_executable",
            "from shutil import which as find_executable",
        ),
        # horovodrun reads a rank's `--net` as an ambiguous abbreviation of its own options.
        Mend(
            "horovod/runner/launch.py",
            "argparse.ArgumentParser(description='Horovod Runner')",
            "argparse.ArgumentParser(description='Horovod Runner', allow_abbrev=False)",
        ),
        # Open MPI 5 takes long options with two dashes only; Open MPI 4 takes both.
        Mend("horovod/runner/mpi_run.py", "['-bind-to none', '-map-by slot']", "['--bind-to none', '--map-by slot']"),
        Mend(
            "horovod/runner/mpi_run.py",
            "['-mca pml ob1', '-mca btl ^openib']",
            "['--mca pml ob1', '--mca btl ^openib']",
        ),
        # horovodrun stops reading a rank at the first byte that is not UTF-8, and the rank then blocks on a full pipe.
        Mend(
            "horovod/runner/common/util/safe_shell_exec.py",
            "codecs.getincrementaldecoder('utf8')()",
            "codecs.getincrementaldecoder('utf8')('replace')",
        ),
        # horovodrun imports torch, in a process of its own, only to ask whether there is Gloo.
        Mend(
            "horovod/common/util.py",
            "        built_fn = lambda ext: ext.gloo_built()\n"
            "        result = _check_extension_lambda(\n"
            "            ext_base_name, built_fn, 'built with Gloo', verbose)\n"
            "        if result is not None:\n"
            "            return result\n",
            "        return True\n",
        ),
        # What is needed to build is given by hvdtrain; setuptools must not fetch eggs.
        Mend("setup.py", "setup_requires=require_list if is_build_action() else []", "setup_requires=[]"),
        # The record of the build goes into the wheel.
        Mend(
            "setup.py",
            "      packages=find_packages(),\n",
            "      packages=find_packages(),\n      package_data={'horovod': ['hvdtrain_build.json']},\n",
        ),
        # No debug information: a wheel of 1 MB instead of 24, and a quarter of the compiling time.
        Mend("setup.py", "else 'RelWithDebInfo'", "else 'Release'"),
        # torch's umbrella headers cost more than all of Horovod's code in these two files.
        Mend("horovod/torch/adapter_v2.h", includes, "#include <torch/types.h>\n"),
        Mend(
            "horovod/torch/mpi_ops_v2.cc",
            includes,
            "#include <torch/types.h>\n#include <torch/csrc/utils/pybind.h>\n",
        ),
        # The second copy of the CUDA kernels, for the C++ ABI that torch does not have, is built only if linked.
        Mend(
            "horovod/common/ops/cuda/CMakeLists.txt",
            "add_library(compatible_horovod_cuda_kernels cuda_kernels.cu)",
            "add_library(compatible_horovod_cuda_kernels EXCLUDE_FROM_ALL cuda_kernels.cu)",
        ),
        Mend(
            "horovod/common/ops/cuda/CMakeLists.txt",
            "add_library(horovod_cuda_kernels cuda_kernels.cu)",
            "add_library(horovod_cuda_kernels EXCLUDE_FROM_ALL cuda_kernels.cu)",
        ),
        # Horovod's own headers are compiled once for all its files; torch's files undefine what these define. The
        # library's run path must not name this machine's build folder.
        Mend(
            torch_cmake,
            'PROPERTIES OUTPUT_NAME "mpi_lib_v2")',
            'PROPERTIES OUTPUT_NAME "mpi_lib_v2")\n'
            "target_precompile_headers(${PYTORCH_TARGET_LIB} PRIVATE\n"
            '    "${PROJECT_SOURCE_DIR}/horovod/common/ops/collective_operations.h")\n'
            "set_source_files_properties(${PYTORCH_SOURCES} PROPERTIES SKIP_PRECOMPILE_HEADERS ON)\n"
            "set_target_properties(${PYTORCH_TARGET_LIB} PROPERTIES BUILD_WITH_INSTALL_RPATH ON\n"
            f'    INSTALL_RPATH "{cmake_text(";".join(rpath))}")\n',
        ),
    ]


def for_gloo() -> list[Mend]:
    """What makes Gloo's exchanges twice as fast where the network limits them, and its coming and going quick.

    A rank tells its peer that it waits for data on the connection by which it sends its own. Told behind megabytes of
    them, the peer sends only when they are through, and the link is used in one direction at a time: so it is told
    first. And whoever closes a connection waits for the loop that watches all of them to come round, which it did
    every 10 ms: a tenth of a second to leave 3 peers, seconds to leave 60. Now it is woken. And a connection that
    another thread works on it leaves for the next time round, which is at once; where both have one core, it kept the
    other from finishing for milliseconds. Now it pauses.
    """
    send = "out->send(sendRank, slot, byteOffsets[sendIndex], byteCounts[sendIndex]);\n"
    receive = "out->recv(recvRank, slot, byteOffsets[recvIndex], byteCounts[recvIndex]);\n"
    part = "in->send(\n        sendRank, slot, inOffsetPerRank[sendRank], inLengthPerRank[sendRank]);\n"
    other = "out->recv(\n        recvRank, slot, outOffsetPerRank[recvRank], outLengthPerRank[recvRank]);\n"
    loop, then = "  for (int i = 1; i < worldSize; i++) {\n", "    int sendRank = (myRank + i) % worldSize;\n"
    whence = "    int recvRank = (myRank + worldSize - i) % worldSize;\n"
    names = ("allgatherv", "alltoallv", "transport/tcp/loop")
    gather, alltoall, watching = (f"third_party/gloo/gloo/{name}.cc" for name in names)
    first, woken = "    if (i == 0) {\n", "    defer([] {});\n"
    pair, busy = "third_party/gloo/gloo/transport/tcp/pair.cc", "std::try_to_lock);\n  if (!lock) {\n"
    pause = "    std::this_thread::sleep_for(std::chrono::microseconds(20));\n"
    return [
        Mend(pair, busy, busy + pause),
        Mend(pair, "#include <sstream>\n", "#include <chrono>\n#include <sstream>\n#include <thread>\n"),
        Mend(gather, f"{first}      {send}      {receive}", f"{first}      {receive}      {send}"),
        Mend(gather, f"timeout);\n    {send}    {receive}", f"timeout);\n    {receive}    {send}"),
        Mend(
            alltoall,
            f"{loop}{then}{whence}    {part}    {other}  }}\n",
            f"{loop}{whence}    {other}  }}\n{loop}{then}    {part}  }}\n",
        ),
        Mend(watching, "    cv_.wait(lock);\n", f"{woken}    cv_.wait(lock);\n"),
        Mend(watching, "    done_ = true;\n", f"    done_ = true;\n{woken}"),
    ]


def for_no_cuda() -> list[Mend]:
    """What a build without NCCL needs: Horovod takes up CUDA whenever torch has it and an nvcc is to be seen."""
    return [
        Mend(
            "cmake/Modules/FindPytorch.cmake",
            "print(True if ((torch.version.cuda is not None) and (CUDA_HOME is not None)) else False)",
            "print(False)",
        ),
        Mend(
            "CMakeLists.txt",
            "include(CheckLanguage)\ncheck_language(CUDA)\nif(NOT CMAKE_CUDA_COMPILER)\n",
            "if(FALSE)\n",
        ),
        Mend("CMakeLists.txt", "if(CMAKE_CUDA_COMPILER)\n    if((CMAKE_CXX", "if(FALSE)\n    if((CMAKE_CXX"),
    ]


def cmake_text(text: str) -> str:
    """Text as it stands between double quotes in CMake."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
