"""The facts of one host as text to paste into a message, and of many as a table of what differs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hvdtrain.doctor.ask import HostReply
from hvdtrain.doctor.facts import Facts
from hvdtrain.doctor.findings import DoctorFinding, format_bytes

# What a table of several hosts shows where it differs. Addresses and free bytes always do, and say nothing.
COMPARED_FACTS = (
    *("hostname", "system", "python", "executable", "hvdtrain", "torch", "horovod", "wheel", "mpi", "nccl", "compiler"),
    *("driver cuda", "gpus", "cpu", "cores usable", "cores allowed", "memory", "memory allowed", "interfaces"),
)


def describe_host(facts: Facts) -> str:
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
            f"{format_bytes(facts['memory'])}, {format_bytes(facts['memory free'])} "
            f"free{f', {format_bytes(limit)} allowed' if limit else ''}",
        ),
        *(("disk", f"{folder}: {describe_disk(state)}") for folder, state in facts["disks"].items()),
        ("/dev/shm", describe_disk(facts["shared memory"])),
        ("limits", ", ".join(f"{name} {'none' if at is None else at}" for name, at in facts["limits"].items())),
        *(("InfiniBand", name) for name in facts["infiniband"]),
        *(("interface", f"{name}: {describe_interface(nic)}") for name, nic in facts["nics"].items()),
        *(("route", route) for route in facts["routes"]),
    ]
    return "\n".join(f"{name:10}  {text}" for name, text in lines)


def describe_disk(state: Facts) -> str:
    """Free and total bytes of a disk."""
    if state["free"] is None:
        return str(state["wrong"])
    wrong = f", {state['wrong']}" if state["wrong"] else ""
    return f"{format_bytes(state['free'])} of {format_bytes(state['total'])} free{wrong}"


def describe_interface(nic: Facts) -> str:
    """An interface in words."""
    speed = f", {nic['speed']} Mbit/s" if nic["speed"] else ""
    return f"{', '.join(nic['addresses']) or 'no address'}, {'up' if nic['up'] else 'down'}, mtu {nic['mtu']}{speed}"


def tabulate_differences(answers: Sequence[HostReply]) -> str:
    """The facts that differ between hosts, a row each; "" where none does."""
    well = [answer for answer in answers if not answer.error]
    rows = []
    for name in COMPARED_FACTS:
        values = [format_cell(answer.facts[name]) for answer in well]
        if len(set(values)) > 1 and not (name == "hostname" and values == [answer.host for answer in well]):
            rows.append([name, *values])
    if not rows:
        return ""
    rows.insert(0, ["", *(answer.host for answer in well)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def format_cell(value: object) -> str:
    """A fact as a cell of a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def format_verdict(found: Sequence[DoctorFinding]) -> str:
    """The last line: all fine, or the worst that was found."""
    if not found:
        return "all fine"
    return str(found[0]) if found[0].bad else f"warning: {found[0]}"
