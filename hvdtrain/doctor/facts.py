"""The facts of this host, as plain values: what is installed, what the machine has, and what of it is left.

Run as `python -m hvdtrain.doctor.facts WANTED`, with Wanted's fields in JSON, it prints them: so other hosts are asked,
over ssh. Nothing here imports torch or Horovod.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdtrain import __version__
from hvdtrain.native import installed, torchinfo
from hvdtrain.system.errors import RunError
from hvdtrain.system.limits import DoctorLimits
from hvdtrain.system.processes import ProcessTimeout, run_process

FACTS_MARKER = "##hvdtrain-facts "  # before the facts in the output: a login shell may print too
UNKNOWN_WHEEL = "(unknown)"  # the wheel of a Horovod that hvdtrain has not built

Facts = dict[str, Any]


@dataclass(frozen=True)
class FactsRequest:
    """What to find out beyond what takes no time."""

    folders: Sequence[str] = ()  # how full their disks are, beside that of temporary files
    back: tuple[str, int] | None = None  # an address and a port: can this host connect to it?
    full: bool = True  # what takes up to a second too: MPI, GPUs, compiler, network


def gather_facts(wanted: FactsRequest) -> Facts:
    """All facts. Takes about 0.1 s, or 0.5 s if `full`."""
    facts: Facts = {"hostname": socket.gethostname()}
    facts |= gather_software_facts()
    facts["disks"] = {folder: gather_disk_facts(Path(folder)) for folder in list_disk_folders(wanted.folders)}
    if wanted.full:
        from hvdtrain.doctor import machine, nics

        facts |= machine.gather_machine_facts() | nics.gather_network_facts() | {"own name": resolve_own_name()}
    else:
        facts["interfaces"] = sorted(name for _, name in socket.if_nameindex())
    if wanted.back is not None:
        facts["way back"] = connect_back_error(*wanted.back)
    facts["time"] = time.time()
    return facts


def gather_software_facts() -> Facts:
    """Python and what is installed in it; `horovod wrong` says in one line why Horovod cannot work, if so."""
    facts: Facts = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "hvdtrain": __version__,
        "torch": None,
        "torch cuda": None,
        "horovod": None,
        "wheel": None,
        "built with": None,
        "horovod wrong": None,
    }
    try:
        horovod, torch = installed.find_horovod(), torchinfo.find_torch()
    except (OSError, ValueError, RunError) as error:
        return facts | {"horovod wrong": f"what is installed cannot be read: {error}"}
    if torch is not None:
        facts |= {"torch": torch.version, "torch cuda": torch.cuda}
    if horovod is not None:
        record = horovod.record
        facts |= {"horovod": horovod.version, "wheel": record.cache_key() if record else UNKNOWN_WHEEL}
        if record is not None:
            facts["built with"] = {name: getattr(record, name) for name in ("torch", "mpi", "nccl", "cuda")}
    if torch is None:
        facts["horovod wrong"] = "no torch: pip install torch"
    elif horovod is None:
        facts["horovod wrong"] = f"Horovod is not installed: {installed.BUILD_HINT}"
    else:
        facts["horovod wrong"] = installed.explain_horovod_mismatch(horovod, torch)
    return facts


def list_disk_folders(more: Sequence[str]) -> list[str]:
    """The folders whose disks matter, each once."""
    # Not tempfile's: it looks for another folder where this one is full.
    return list(dict.fromkeys([*(str(Path(folder).absolute()) for folder in more), os.environ.get("TMPDIR", "/tmp")]))


def gather_disk_facts(folder: Path) -> Facts:
    """Free and total bytes where a folder lies, or will lie, and in `wrong` why nothing can be written there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage, state = shutil.disk_usage(folder), os.statvfs(folder)
    except OSError as error:
        return {"free": None, "total": None, "wrong": error.strerror}
    wrong = None
    if state.f_files and not state.f_favail:
        wrong = "no inode is left"
    elif not os.access(folder, os.W_OK):
        wrong = os.strerror(errno.EROFS if state.f_flag & os.ST_RDONLY else errno.EACCES)
    return {"free": usage.free, "total": usage.total, "wrong": wrong}


def resolve_own_name() -> list[str]:
    """The IPv4 addresses that this host's own name stands for here; none if it does not resolve."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(address[0]) for *_, address in found})


def connect_back_error(address: str, port: int) -> str | None:
    """Why this host cannot connect to an address and port; None if it can."""
    try:
        with socket.create_connection((address, port), DoctorLimits.connect_back):
            return None
    except TimeoutError:
        return f"no answer within {DoctorLimits.connect_back:g} s"
    except OSError as error:
        return error.strerror or str(error)


def read_stripped_text(path: str) -> str | None:
    """A small file's text without white space around it, None if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def first_output_line(command: Sequence[str], seconds: float = DoctorLimits.first_line) -> str | None:
    """The first line that a program prints, None if there is no such program or it fails."""
    try:
        done = run_process(command, seconds)
    except (OSError, ProcessTimeout):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and done.exit_code == 0 else None


def parse_facts(output: str) -> Facts | None:
    """The facts in what this file printed as a program."""
    at = output.find(FACTS_MARKER)
    if at < 0:
        return None
    facts = json.loads(output[at + len(FACTS_MARKER) :].splitlines()[0])
    return facts if isinstance(facts, dict) else None


def dump_request(wanted: FactsRequest) -> str:
    """`wanted` as this file takes it as a program."""
    return json.dumps(asdict(wanted))


def main(text: str, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the facts that are wanted."""
    given = json.loads(text)
    if given["back"] is not None:
        given["back"] = tuple(given["back"])
    write(f"{FACTS_MARKER}{json.dumps(gather_facts(FactsRequest(**given)))}\n")


if __name__ == "__main__":
    main(sys.argv[1])
