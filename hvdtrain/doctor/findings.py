"""What is wrong, from facts: of one host, and of hosts that are to work together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hvdtrain.doctor.ask import HostReply
from hvdtrain.doctor.facts import Facts

MIN_FREE_DISK = 64 << 20  # bytes: a disk with less is full
MIN_SHARED_MEMORY = 128 << 20  # bytes; a container has 64 MiB if nobody asks for more
MIN_FREE_MEMORY = 512 << 20  # bytes
MIN_OPEN_FILES = 1024
MIN_LOCKED_MEMORY = 1 << 30  # bytes: InfiniBand locks its buffers
MAX_CLOCK_OFFSET = 2.0  # seconds
MAX_LOAD_PER_CORE = 2.0  # runnable processes for each core

# What must be the same on all hosts, and how it is called in front of its value.
MUST_MATCH = {
    "python": "Python",
    "hvdtrain": "hvdtrain",
    "torch": "torch",
    "horovod": "Horovod",
    "wheel": "Horovod built as",
    "mpi": "",
}


class DoctorFinding(NamedTuple):
    """Something wrong and what to do about it; what is not bad may be left as it is."""

    where: str  # "host h2", "link h1-h3", or "" for this host alone
    text: str
    bad: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def sort_by_severity(found: Sequence[DoctorFinding]) -> list[DoctorFinding]:
    """The bad ones before the others; otherwise as they were found."""
    return sorted(found, key=lambda finding: not finding.bad)


def diagnose_host(facts: Facts, where: str = "") -> list[DoctorFinding]:
    """What is wrong with one host, as far as its facts go."""
    found = []
    if facts["horovod wrong"]:
        found.append(DoctorFinding(where, facts["horovod wrong"]))
        if not facts.get("compiler", "unknown"):
            found.append(DoctorFinding(where, "no C++ compiler, which `hvdtrain horovod build` needs: install g++"))
    for folder, state in facts["disks"].items():
        if state["wrong"]:
            found.append(DoctorFinding(where, f"nothing can be written in {folder}: {state['wrong']}"))
        elif state["free"] < MIN_FREE_DISK:
            found.append(DoctorFinding(where, f"the disk is full: {format_bytes(state['free'])} is free in {folder}"))
    if facts.get("way back"):
        found.append(DoctorFinding(where, f"cannot connect to this host: {facts['way back']}; is there a firewall?"))
    if "gpus" in facts:  # the facts are full
        if facts["horovod"] and facts["built with"] is None:
            text = "Horovod was not built by hvdtrain: over several hosts it may fail; run `hvdtrain horovod build`"
            found.append(DoctorFinding(where, text, bad=False))
        found += check_own_name(facts, where) + check_gpus(facts, where) + check_resources(facts, where)
    return found


def check_own_name(facts: Facts, where: str) -> list[DoctorFinding]:
    """A host whose own name does not lead to it from the others: Debian's installer writes 127.0.1.1 for it."""
    addresses = facts["own name"]
    if addresses and not all(address.startswith("127.") for address in addresses):
        return []
    unmended = facts["built with"] is None
    if not where and not unmended:
        return []  # alone, it does no harm
    what = f"its own name {facts['hostname']} is {addresses[0]} there" if addresses else "its own name does not resolve"
    return [DoctorFinding(where, f"{what}: give it its network address in /etc/hosts", bad=unmended and bool(where))]


def check_gpus(facts: Facts, where: str) -> list[DoctorFinding]:
    """GPUs that cannot be used as they are."""
    found = []
    listed, driver, needed = facts["gpus"], facts["driver cuda"], facts["torch cuda"]
    if listed and listed[0].startswith("nvidia-smi"):
        found.append(DoctorFinding(where, f"{listed[0]}: mend the driver"))
    elif listed:
        if needed is None:
            found.append(DoctorFinding(where, f"{len(listed)} GPUs, and torch is built without CUDA", bad=False))
        elif driver and int(driver.split(".")[0]) < int(needed.split(".")[0]):
            text = f"the GPU driver knows CUDA {driver} at most, torch is built for {needed}: get a newer driver"
            found.append(DoctorFinding(where, text))
        if needed and facts["built with"] and not facts["built with"]["nccl"]:
            text = "GPUs, and Horovod is built without NCCL: install a CUDA toolkit, then `hvdtrain horovod build`"
            found.append(DoctorFinding(where, text, bad=False))
    return found


def check_resources(facts: Facts, where: str) -> list[DoctorFinding]:
    """Too little of memory, of shared memory, of open files; too much to do."""
    found = []
    free, shared = facts["memory free"], facts["shared memory"]
    if free < MIN_FREE_MEMORY:
        found.append(DoctorFinding(where, f"{format_bytes(free)} of memory is free: end something", bad=False))
    if shared["free"] is not None and shared["free"] < MIN_SHARED_MEMORY:
        text = f"{format_bytes(shared['free'])} is free in /dev/shm: give the container more (docker run --shm-size=8g)"
        found.append(DoctorFinding(where, text, bad=False))
    files, locked = facts["limits"]["nofile"], facts["limits"]["memlock"]
    if files is not None and files < MIN_OPEN_FILES:
        found.append(DoctorFinding(where, f"{files} files may be open at once: ulimit -n 65536", bad=False))
    if facts["infiniband"] and locked is not None and locked < MIN_LOCKED_MEMORY:
        text = f"InfiniBand, and {format_bytes(locked)} of memory may be locked: ulimit -l unlimited"
        found.append(DoctorFinding(where, text, bad=False))
    if not where and facts["load"] > MAX_LOAD_PER_CORE * facts["cores usable"]:
        # Among several hosts, the work that they do is measured.
        text = f"it is busy: load {facts['load']:.1f} on {facts['cores usable']} cores"
        found.append(DoctorFinding(where, text, bad=False))
    return found


def diagnose_hosts(answers: Sequence[HostReply], nic: str | None = None) -> list[DoctorFinding]:
    """What is wrong with hosts that are to work together, the worst first."""
    found = [DoctorFinding(f"host {answer.host}", answer.error) for answer in answers if answer.error]
    well = [answer for answer in answers if not answer.error]
    different = find_version_differences(well)
    found += different
    for answer in well:
        where = f"host {answer.host}"
        if nic and nic not in answer.facts["interfaces"]:
            names = ", ".join(name for name in answer.facts["interfaces"] if name != "lo")
            found.append(DoctorFinding(where, f"has no interface {nic}; it has {names or 'none'}"))
        explained = any(finding.where == where for finding in different)
        facts = answer.facts | ({"horovod wrong": None} if explained else {})
        found += diagnose_host(facts, where)
        if abs(answer.clock_offset) > MAX_CLOCK_OFFSET:
            way = "ahead of" if answer.clock_offset > 0 else "behind"
            text = f"its clock is {abs(answer.clock_offset):.0f} s {way} this host's: set it by NTP"
            found.append(DoctorFinding(where, text, bad=False))
    return sort_by_severity(found)


def find_version_differences(answers: Sequence[HostReply]) -> list[DoctorFinding]:
    """The hosts that have other software than most of them; where none is in the majority, than the first one."""
    texts: dict[str, list[str]] = {}
    for name, title in MUST_MATCH.items():
        # A host without any is told of elsewhere.
        values = {answer.host: str(answer.facts[name]) for answer in answers if answer.facts.get(name)}
        if name == "python":
            values = {host: ".".join(value.split(".")[:2]) for host, value in values.items()}
        counts = Counter(values.values())
        if len(counts) < 2:
            continue
        usual = max(counts, key=lambda value: counts[value])  # the first one of the most frequent
        for host, value in values.items():
            if value != usual:
                others = (
                    f"the other {counts[usual]} have" if counts[usual] > 1 else f"{first_host_with(values, usual)} has"
                )
                one, other = shorten_versions(value, usual)
                texts.setdefault(host, []).append(f"{title} {one}, {others} {other}".strip())
    return [DoctorFinding(f"host {host}", "; ".join(text)) for host, text in texts.items()]


def first_host_with(values: dict[str, str], wanted: str) -> str:
    """The first host with a value."""
    return next(host for host, value in values.items() if value == wanted)


def shorten_versions(one: str, other: str) -> tuple[str, str]:
    """Two versions without what follows a +, if they differ without it."""
    short = one.split("+")[0], other.split("+")[0]
    return short if short[0] != short[1] and not one.startswith("horovod") else (one, other)


def format_bytes(count: int) -> str:
    """Bytes for people."""
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
