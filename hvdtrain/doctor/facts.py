"""Gather the facts of this host: what is installed, what the machine has, and how much of it is left.

As a program, `python -m hvdtrain.doctor.facts REQUEST`, it prints them in one line: so other hosts are asked over ssh.
Nothing here imports torch or Horovod.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hvdtrain.doctor.host_facts import (
    UNKNOWN_WHEEL,
    BuildVersions,
    FactsRequest,
    HostFacts,
    SoftwareFacts,
    format_facts_line,
    parse_request,
)
from hvdtrain.doctor.readings import read_disk
from hvdtrain.native import installed, torchinfo
from hvdtrain.native.installed import InstalledHorovod
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.version import __version__


def gather_facts(request: FactsRequest) -> HostFacts:
    """Return the facts of this host. Takes about 0.1 s, or 0.5 s if the request is `full`."""
    software = gather_software_facts()
    disks = {folder: read_disk(Path(folder)) for folder in list_disk_folders(request.folders)}
    machine = network = None
    if request.full:
        from hvdtrain.doctor.machine import gather_machine_facts
        from hvdtrain.doctor.nics import gather_network_facts

        machine, network = gather_machine_facts(), gather_network_facts()
    back_error = connect_back_error(*request.back) if request.back is not None else None
    return HostFacts(
        hostname=socket.gethostname(),
        software=software,
        disks=disks,
        interfaces=sorted(network.nics if network is not None else [name for _, name in socket.if_nameindex()]),
        time=time.time(),
        machine=machine,
        network=network,
        file_errors=find_file_errors(request),
        asked_back=request.back is not None,
        back_error=back_error,
    )


def gather_software_facts() -> SoftwareFacts:
    """Return the versions of Python and of what is installed in it, and why Horovod cannot work, if so."""
    python, executable = platform.python_version(), sys.executable
    try:
        horovod, torch = installed.find_horovod(), torchinfo.find_torch()
    except (OSError, ValueError, RunError) as error:
        return SoftwareFacts(python, executable, __version__, horovod_error=f"cannot read what is installed: {error}")
    if torch is None:
        problem: str | None = "no torch: pip install torch"
    elif horovod is None:
        problem = f"Horovod is not installed: {installed.BUILD_HINT}"
    else:
        problem = installed.explain_horovod_mismatch(horovod, torch)
    return SoftwareFacts(
        python=python,
        executable=executable,
        hvdtrain=__version__,
        torch=torch.version if torch is not None else None,
        torch_cuda=torch.cuda if torch is not None else None,
        horovod=horovod.version if horovod is not None else None,
        wheel=name_wheel(horovod) if horovod is not None else None,
        built_with=build_versions(horovod) if horovod is not None else None,
        horovod_error=problem,
    )


def name_wheel(horovod: InstalledHorovod) -> str:
    """Return the key of an installed Horovod in the cache of builds, UNKNOWN_WHEEL if hvdtrain did not build it."""
    return horovod.record.cache_key() if horovod.record is not None else UNKNOWN_WHEEL


def build_versions(horovod: InstalledHorovod) -> BuildVersions | None:
    """Return what an installed Horovod was built for, None if hvdtrain did not build it."""
    record = horovod.record
    return BuildVersions(record.torch, record.mpi, record.nccl, record.cuda) if record is not None else None


def list_disk_folders(more: Sequence[str]) -> list[str]:
    """Return the folders whose disks matter, each once: these, and that of temporary files."""
    # Not tempfile's: it looks for another folder if this one is full.
    return list(dict.fromkeys([*(str(Path(folder).absolute()) for folder in more), os.environ.get("TMPDIR", "/tmp")]))


def find_file_errors(request: FactsRequest) -> dict[str, str]:
    """Return what is wrong with the files that a request names, by file."""
    errors = {}
    for names, mode, problem in (
        (request.programs, os.X_OK, "is not executable"),
        (request.files, os.R_OK, "cannot be read"),
    ):
        for name in names:
            if not Path(name).exists():
                errors[name] = "does not exist"
            elif not os.access(name, mode):
                errors[name] = problem
    return errors


def connect_back_error(address: str, port: int) -> str | None:
    """Return why this host cannot connect to an address and port; None if it can."""
    try:
        with socket.create_connection((address, port), DoctorLimits.connect_back):
            return None
    except TimeoutError:
        return f"no answer within {DoctorLimits.connect_back:g} s"
    except OSError as error:
        return error.strerror or str(error)


def main(text: str, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the facts that a request asks for."""
    write(format_facts_line(gather_facts(parse_request(text))))


if __name__ == "__main__":
    main(sys.argv[1])
