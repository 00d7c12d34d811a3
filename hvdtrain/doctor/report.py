"""The facts of one host as text to paste into a message, and of many as a table of what differs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hvdtrain.doctor.ask import Answer
from hvdtrain.doctor.facts import Facts
from hvdtrain.doctor.findings import Finding, size

# What a table of several hosts shows where it differs. Addresses and free bytes always do, and say nothing.
TOLD = (
    *("hostname", "system", "python", "executable", "hvdtrain", "torch", "horovod", "wheel", "mpi", "nccl", "compiler"),
    *("driver cuda", "gpus", "cpu", "cores usable", "cores allowed", "memory", "memory allowed", "interfaces"),
)


def describe(facts: Facts) -> str:
    """All facts of one host, a line each."""
    built = facts["built with"] or {}
    parts = ", ".join(f"{name} {version}" for name, version in built.items() if version)
    allowed, limit = facts["cores allowed"], facts["memory allowed"]
    lines = [
        ("host", f"{facts['hostname']} ({', '.join(facts['own name']) or 'its name does not resolve'})"),
        ("time", time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(facts["time"]))),
        ("system", facts["system"]),
        ("Python", f"{facts['python']} {facts['executable']}"),
        ("hvdtrain", facts["hvdtrain"]),
        ("torch", f"{facts['torch'] or 'none'}{f', for CUDA {cuda}' if (cuda := facts['torch cuda']) else ''}"),
        ("Horovod", f"{facts['horovod'] or 'none'}{f', built for {parts}' if parts else ''}"),
        ("wheel", facts["wheel"] or "none"),
        ("MPI", facts["mpi"] or "none"),
        ("NCCL", facts["nccl"] or "none"),
        ("compiler", facts["compiler"] or "none"),
        ("GPU driver", f"for CUDA {facts['driver cuda']}" if facts["driver cuda"] else "none"),
        *(("GPU", gpu) for gpu in facts["gpus"] or ["none"]),
        ("CPU", f"{facts['cpu']}"),
        (
            "cores",
            f"{facts['cores']}, {facts['cores usable']} usable"
            f"{f', time of {allowed:g} allowed' if allowed else ''}, load {facts['load']:.1f}",
        ),
        (
            "memory",
            f"{size(facts['memory'])}, {size(facts['memory free'])} free{f', {size(limit)} allowed' if limit else ''}",
        ),
        *(("disk", f"{folder}: {space(state)}") for folder, state in facts["disks"].items()),
        ("/dev/shm", space(facts["shared memory"])),
        ("limits", ", ".join(f"{name} {'none' if at is None else at}" for name, at in facts["limits"].items())),
        *(("InfiniBand", name) for name in facts["infiniband"]),
        *(("interface", f"{name}: {interface(nic)}") for name, nic in facts["nics"].items()),
        *(("route", route) for route in facts["routes"]),
    ]
    return "\n".join(f"{name:10}  {text}" for name, text in lines)


def space(state: Facts) -> str:
    """Free and total bytes of a disk."""
    if state["free"] is None:
        return str(state["wrong"])
    wrong = f", {state['wrong']}" if state["wrong"] else ""
    return f"{size(state['free'])} of {size(state['total'])} free{wrong}"


def interface(nic: Facts) -> str:
    """An interface in words."""
    speed = f", {nic['speed']} Mbit/s" if nic["speed"] else ""
    return f"{', '.join(nic['addresses']) or 'no address'}, {'up' if nic['up'] else 'down'}, mtu {nic['mtu']}{speed}"


def table(answers: Sequence[Answer]) -> str:
    """The facts that differ between hosts, a row each; "" where none does."""
    well = [answer for answer in answers if not answer.wrong]
    rows = []
    for name in TOLD:
        values = [text_of(answer.facts[name]) for answer in well]
        if len(set(values)) > 1 and not (name == "hostname" and values == [answer.host for answer in well]):
            rows.append([name, *values])
    if not rows:
        return ""
    rows.insert(0, ["", *(answer.host for answer in well)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def text_of(value: object) -> str:
    """A fact as a cell of a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def verdict(found: Sequence[Finding]) -> str:
    """The last line: all fine, or the worst that was found."""
    if not found:
        return "all fine"
    return str(found[0]) if found[0].bad else f"warning: {found[0]}"
