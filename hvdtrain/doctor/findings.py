"""What is wrong, from facts: of one host, and of hosts that are to work together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hvdtrain.doctor.ask import Answer
from hvdtrain.doctor.facts import Facts

FULL = 64 << 20  # bytes: a disk with less is full
SMALL_SHARED_MEMORY = 128 << 20  # bytes; a container has 64 MiB if nobody asks for more
SMALL_MEMORY = 512 << 20  # bytes
FEW_FILES = 1024
LOCKED = 1 << 30  # bytes: InfiniBand locks its buffers
CLOCK = 2.0  # seconds
BUSY = 2.0  # runnable processes for each core

# What must be the same on all hosts, and how it is called in front of its value.
SAME = {
    "python": "Python",
    "hvdtrain": "hvdtrain",
    "torch": "torch",
    "horovod": "Horovod",
    "wheel": "Horovod built as",
    "mpi": "",
}


class Finding(NamedTuple):
    """Something wrong and what to do about it; what is not bad may be left as it is."""

    where: str  # "host h2", "link h1-h3", or "" for this host alone
    text: str
    bad: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


def worst_first(found: Sequence[Finding]) -> list[Finding]:
    """The bad ones before the others; otherwise as they were found."""
    return sorted(found, key=lambda finding: not finding.bad)


def of_host(facts: Facts, where: str = "") -> list[Finding]:
    """What is wrong with one host, as far as its facts go."""
    found = []
    if facts["horovod wrong"]:
        found.append(Finding(where, facts["horovod wrong"]))
        if not facts.get("compiler", "unknown"):
            found.append(Finding(where, "no C++ compiler, which `hvdtrain horovod build` needs: install g++"))
    for folder, state in facts["disks"].items():
        if state["wrong"]:
            found.append(Finding(where, f"nothing can be written in {folder}: {state['wrong']}"))
        elif state["free"] < FULL:
            found.append(Finding(where, f"the disk is full: {size(state['free'])} is free in {folder}"))
    if facts.get("way back"):
        found.append(Finding(where, f"cannot connect to this host: {facts['way back']}; is there a firewall?"))
    if "gpus" in facts:  # the facts are full
        if facts["horovod"] and facts["built with"] is None:
            text = "Horovod was not built by hvdtrain: over several hosts it may fail; run `hvdtrain horovod build`"
            found.append(Finding(where, text, bad=False))
        found += own_name(facts, where) + gpus(facts, where) + room(facts, where)
    return found


def own_name(facts: Facts, where: str) -> list[Finding]:
    """A host whose own name does not lead to it from the others: Debian's installer writes 127.0.1.1 for it."""
    addresses = facts["own name"]
    if addresses and not all(address.startswith("127.") for address in addresses):
        return []
    unmended = facts["built with"] is None
    if not where and not unmended:
        return []  # alone, it does no harm
    what = f"its own name {facts['hostname']} is {addresses[0]} there" if addresses else "its own name does not resolve"
    return [Finding(where, f"{what}: give it its network address in /etc/hosts", bad=unmended and bool(where))]


def gpus(facts: Facts, where: str) -> list[Finding]:
    """GPUs that cannot be used as they are."""
    found = []
    listed, driver, needed = facts["gpus"], facts["driver cuda"], facts["torch cuda"]
    if listed and listed[0].startswith("nvidia-smi"):
        found.append(Finding(where, f"{listed[0]}: mend the driver"))
    elif listed:
        if needed is None:
            found.append(Finding(where, f"{len(listed)} GPUs, and torch is built without CUDA", bad=False))
        elif driver and int(driver.split(".")[0]) < int(needed.split(".")[0]):
            text = f"the GPU driver knows CUDA {driver} at most, torch is built for {needed}: get a newer driver"
            found.append(Finding(where, text))
        if needed and facts["built with"] and not facts["built with"]["nccl"]:
            text = "GPUs, and Horovod is built without NCCL: install a CUDA toolkit, then `hvdtrain horovod build`"
            found.append(Finding(where, text, bad=False))
    return found


def room(facts: Facts, where: str) -> list[Finding]:
    """Too little of memory, of shared memory, of open files; too much to do."""
    found = []
    free, shared = facts["memory free"], facts["shared memory"]
    if free < SMALL_MEMORY:
        found.append(Finding(where, f"{size(free)} of memory is free: end something", bad=False))
    if shared["free"] is not None and shared["free"] < SMALL_SHARED_MEMORY:
        text = f"{size(shared['free'])} is free in /dev/shm: give the container more (docker run --shm-size=8g)"
        found.append(Finding(where, text, bad=False))
    files, locked = facts["limits"]["nofile"], facts["limits"]["memlock"]
    if files is not None and files < FEW_FILES:
        found.append(Finding(where, f"{files} files may be open at once: ulimit -n 65536", bad=False))
    if facts["infiniband"] and locked is not None and locked < LOCKED:
        text = f"InfiniBand, and {size(locked)} of memory may be locked: ulimit -l unlimited"
        found.append(Finding(where, text, bad=False))
    if not where and facts["load"] > BUSY * facts["cores usable"]:
        # Among several hosts, the work that they do is measured.
        text = f"it is busy: load {facts['load']:.1f} on {facts['cores usable']} cores"
        found.append(Finding(where, text, bad=False))
    return found


def of_hosts(answers: Sequence[Answer], nic: str | None = None) -> list[Finding]:
    """What is wrong with hosts that are to work together, the worst first."""
    found = [Finding(f"host {answer.host}", answer.wrong) for answer in answers if answer.wrong]
    well = [answer for answer in answers if not answer.wrong]
    different = differences(well)
    found += different
    for answer in well:
        where = f"host {answer.host}"
        if nic and nic not in answer.facts["interfaces"]:
            names = ", ".join(name for name in answer.facts["interfaces"] if name != "lo")
            found.append(Finding(where, f"has no interface {nic}; it has {names or 'none'}"))
        explained = any(finding.where == where for finding in different)
        facts = answer.facts | ({"horovod wrong": None} if explained else {})
        found += of_host(facts, where)
        if abs(answer.clock) > CLOCK:
            way = "ahead of" if answer.clock > 0 else "behind"
            text = f"its clock is {abs(answer.clock):.0f} s {way} this host's: set it by NTP"
            found.append(Finding(where, text, bad=False))
    return worst_first(found)


def differences(answers: Sequence[Answer]) -> list[Finding]:
    """The hosts that have other software than most of them; where none is in the majority, than the first one."""
    texts: dict[str, list[str]] = {}
    for name, title in SAME.items():
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
                others = f"the other {counts[usual]} have" if counts[usual] > 1 else f"{first(values, usual)} has"
                one, other = brief(value, usual)
                texts.setdefault(host, []).append(f"{title} {one}, {others} {other}".strip())
    return [Finding(f"host {host}", "; ".join(text)) for host, text in texts.items()]


def first(values: dict[str, str], wanted: str) -> str:
    """The first host with a value."""
    return next(host for host, value in values.items() if value == wanted)


def brief(one: str, other: str) -> tuple[str, str]:
    """Two versions without what follows a +, if they differ without it."""
    short = one.split("+")[0], other.split("+")[0]
    return short if short[0] != short[1] and not one.startswith("horovod") else (one, other)


def size(count: int) -> str:
    """Bytes for people."""
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
