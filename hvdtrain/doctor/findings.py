"""What is wrong, from facts: with one host, and with hosts that are to work together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from hvdtrain.doctor.host_facts import HostFacts, MachineFacts, NetworkFacts, SoftwareFacts
from hvdtrain.doctor.query import HostReply

MIN_FREE_DISK = 64 << 20  # bytes: a disk with less is full
MIN_SHARED_MEMORY = 128 << 20  # bytes; a container has 64 MiB by default
MIN_FREE_MEMORY = 512 << 20  # bytes
MIN_OPEN_FILES = 1024
MIN_LOCKED_MEMORY = 1 << 30  # bytes: InfiniBand locks its buffers
MAX_CLOCK_OFFSET = 2.0  # seconds
MAX_LOAD_PER_CORE = 2.0  # running processes for each core


class DoctorFinding(NamedTuple):
    """Something wrong and what to do about it.

    Attributes:
        where: "host h2", "link h1-h3", or "" for this host alone.
        text: what is wrong.
        bad: whether it prevents a run; if not, it is a warning.
    """

    where: str
    text: str
    bad: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def sort_by_severity(found: Sequence[DoctorFinding]) -> list[DoctorFinding]:
    """Return the bad findings before the warnings, otherwise in the same order."""
    return sorted(found, key=lambda finding: not finding.bad)


def diagnose_host(facts: HostFacts, where: str = "") -> list[DoctorFinding]:
    """Return what is wrong with one host, as far as its facts go.

    Args:
        facts: of the host.
        where: for the findings: "host h2" for one of several, "" for this host alone.
    """
    found = []
    software, machine = facts.software, facts.machine
    if software.horovod_error:
        found.append(DoctorFinding(where, software.horovod_error))
        if machine is not None and not machine.compiler:
            found.append(DoctorFinding(where, "no C++ compiler, which `hvdtrain horovod build` needs: install g++"))
    for folder, disk in facts.disks.items():
        if disk.error:
            found.append(DoctorFinding(where, f"cannot write in {folder}: {disk.error}"))
        elif disk.free is not None and disk.free < MIN_FREE_DISK:
            found.append(DoctorFinding(where, f"the disk is full: {format_bytes(disk.free)} is free in {folder}"))
    if facts.back_error:
        found.append(DoctorFinding(where, f"cannot connect to this host: {facts.back_error}; is there a firewall?"))
    for file, problem in facts.file_errors.items():
        found.append(DoctorFinding(where, f"{file} {problem} there: ranks need it at the same path on every host"))
    if machine is not None:
        if software.horovod and software.built_with is None:
            text = "Horovod was not built by hvdtrain: over several hosts it may fail; run `hvdtrain horovod build`"
            found.append(DoctorFinding(where, text, bad=False))
        if facts.network is not None:
            found += check_own_name(facts, facts.network, where)
        found += check_gpus(software, machine, where) + check_resources(machine, where)
    return found


def check_own_name(facts: HostFacts, network: NetworkFacts, where: str) -> list[DoctorFinding]:
    """Check that a host's own name resolves to an address that others reach: Debian's installer maps it to 127.0.1.1.

    Horovod as hvdtrain builds it does not depend on that name, so that this is a warning only.
    """
    addresses = network.own_addresses
    if addresses and not all(address.startswith("127.") for address in addresses):
        return []
    unpatched = facts.software.built_with is None
    if not where and not unpatched:
        return []  # alone, it does no harm
    problem = f"resolves to {addresses[0]}" if addresses else "does not resolve"
    text = f"its hostname {problem}; map it to its network address in /etc/hosts"
    return [DoctorFinding(where, text, bad=unpatched and bool(where))]


def check_gpus(software: SoftwareFacts, machine: MachineFacts, where: str) -> list[DoctorFinding]:
    """Check that the GPUs can be used with this driver, torch and Horovod."""
    found = []
    gpus, driver, needed = machine.gpus, machine.driver_cuda, software.torch_cuda
    if gpus and gpus[0].startswith("nvidia-smi"):
        found.append(DoctorFinding(where, f"{gpus[0]}: reinstall the driver"))
    elif gpus:
        if needed is None:
            found.append(DoctorFinding(where, f"{len(gpus)} GPUs, but torch is built without CUDA", bad=False))
        elif driver and int(driver.split(".")[0]) < int(needed.split(".")[0]):
            text = f"the GPU driver supports CUDA up to {driver}, torch is built for {needed}: install a newer driver"
            found.append(DoctorFinding(where, text))
        if needed and software.built_with and not software.built_with.nccl:
            text = "GPUs, but Horovod is built without NCCL: install a CUDA toolkit, then `hvdtrain horovod build`"
            found.append(DoctorFinding(where, text, bad=False))
    return found


def check_resources(machine: MachineFacts, where: str) -> list[DoctorFinding]:
    """Check memory, shared memory, the limits on open files and locked memory, and the load."""
    texts = []
    free, shared = machine.memory_free, machine.shared_memory.free
    if free is not None and free < MIN_FREE_MEMORY:
        texts.append(f"only {format_bytes(free)} of memory is free: stop other processes")
    if shared is not None and shared < MIN_SHARED_MEMORY:
        texts.append(
            f"only {format_bytes(shared)} is free in /dev/shm: give the container more (docker run --shm-size=8g)"
        )
    files, locked = machine.limits.get("nofile"), machine.limits.get("memlock")
    if files is not None and files < MIN_OPEN_FILES:
        texts.append(f"only {files} files may be open at once: ulimit -n 65536")
    if machine.infiniband and locked is not None and locked < MIN_LOCKED_MEMORY:
        texts.append(
            f"there is InfiniBand, but only {format_bytes(locked)} may be locked in memory: ulimit -l unlimited"
        )
    # Among several hosts, the CPU is measured.
    load, cores = machine.load, machine.cores_usable
    if not where and load is not None and cores is not None and load > MAX_LOAD_PER_CORE * cores:
        texts.append(f"it is busy: load {load:.1f} on {cores} cores")
    return [DoctorFinding(where, text, bad=False) for text in texts]


def diagnose_hosts(replies: Sequence[HostReply], nic: str | None = None) -> list[DoctorFinding]:
    """Return what is wrong with hosts that are to work together, the worst first.

    Args:
        replies: of the hosts.
        nic: the network interface that all must have; None: any.
    """
    found = [DoctorFinding(f"host {reply.host}", reply.error) for reply in replies if reply.error]
    valid = [reply for reply in replies if not reply.error]
    different = find_version_differences(valid)
    found += different
    for reply in valid:
        where, facts = f"host {reply.host}", reply.facts
        if nic and nic not in facts.interfaces:
            names = ", ".join(name for name in facts.interfaces if name != "lo")
            found.append(DoctorFinding(where, f"has no interface {nic}; it has {names or 'none'}"))
        if any(finding.where == where for finding in different):  # that explains what is wrong with its Horovod
            facts = replace(facts, software=replace(facts.software, horovod_error=None))
        found += diagnose_host(facts, where)
        if abs(reply.clock_offset) > MAX_CLOCK_OFFSET:
            direction = "ahead of" if reply.clock_offset > 0 else "behind"
            text = f"its clock is {abs(reply.clock_offset):.0f} s {direction} this host's: synchronize it by NTP"
            found.append(DoctorFinding(where, text, bad=False))
    return sort_by_severity(found)


def find_version_differences(replies: Sequence[HostReply]) -> list[DoctorFinding]:
    """Return the hosts whose software differs from that of most; without a majority, from that of the first host."""
    texts: dict[str, list[str]] = {}
    versions = {reply.host: list_versions(reply.facts) for reply in replies}
    for title in list_versions(HostFacts()):
        # A host without a value has another finding.
        values = {host: value for host, its in versions.items() if (value := its[title])}
        counts = Counter(values.values())
        if len(counts) < 2:
            continue
        usual = max(counts, key=lambda value: counts[value])  # the first one of the most frequent
        owner = f"the other {counts[usual]} have" if counts[usual] > 1 else f"{first_host_with(values, usual)} has"
        for host, value in values.items():
            if value != usual:
                one, other = shorten_versions(value, usual)
                texts.setdefault(host, []).append(f"{title} {one}, {owner} {other}".strip())
    return [DoctorFinding(f"host {host}", "; ".join(text)) for host, text in texts.items()]


def list_versions(facts: HostFacts) -> dict[str, str | None]:
    """Return what must be the same on all hosts, by what messages call it before its value."""
    software, machine = facts.software, facts.machine
    python = ".".join(software.python.split(".")[:2]) if software.python else None  # a patch makes no difference
    return {
        "Python": python,
        "hvdtrain": software.hvdtrain,
        "torch": software.torch,
        "Horovod": software.horovod,
        "Horovod built as": software.wheel,
        "": machine.mpi if machine is not None else None,
    }


def first_host_with(values: Mapping[str, str], wanted: str) -> str:
    """Return the first host with a value."""
    return next(host for host, value in values.items() if value == wanted)


def shorten_versions(one: str, other: str) -> tuple[str, str]:
    """Return two versions without what follows a +, if they differ without it."""
    short = one.split("+")[0], other.split("+")[0]
    return short if short[0] != short[1] and not one.startswith("horovod") else (one, other)


def format_bytes(count: int) -> str:
    """Return a number of bytes in a readable unit: 64 MiB."""
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
