"""The facts of one host as text to paste into a message, and of several as a table of what differs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hvdtrain.doctor.findings import DoctorFinding, format_bytes
from hvdtrain.doctor.host_facts import DiskFacts, HostFacts, InterfaceFacts, MachineFacts, NetworkFacts, SoftwareFacts
from hvdtrain.doctor.query import HostReply


def describe_host(facts: HostFacts) -> str:
    """Return all facts of one host, one to a line."""
    machine, network = facts.machine or MachineFacts(), facts.network or NetworkFacts()
    lines = [
        ("host", f"{facts.hostname} ({', '.join(network.own_addresses) or 'its name does not resolve'})"),
        ("time", time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(facts.time))),
        ("system", machine.system or "unknown"),
        *describe_software(facts.software, machine),
        *describe_machine(machine),
        *(("disk", f"{folder}: {describe_disk(disk)}") for folder, disk in facts.disks.items()),
        ("/dev/shm", describe_disk(machine.shared_memory)),
        ("limits", ", ".join(f"{name} {'none' if at is None else at}" for name, at in machine.limits.items())),
        *(("InfiniBand", name) for name in machine.infiniband),
        *(("interface", f"{name}: {describe_interface(nic)}") for name, nic in network.nics.items()),
        *(("route", route) for route in network.routes),
    ]
    return "\n".join(f"{name:10}  {text}" for name, text in lines)


def describe_software(software: SoftwareFacts, machine: MachineFacts) -> list[tuple[str, str]]:
    """Return the lines on what is installed."""
    built = software.built_with
    names = (
        ()
        if built is None
        else (("torch", built.torch), ("mpi", built.mpi), ("nccl", built.nccl), ("cuda", built.cuda))
    )
    parts = ", ".join(f"{name} {version}" for name, version in names if version)
    cuda = f", for CUDA {software.torch_cuda}" if software.torch_cuda else ""
    return [
        ("Python", f"{software.python} {software.executable}"),
        ("hvdtrain", str(software.hvdtrain)),
        ("torch", f"{software.torch or 'none'}{cuda}"),
        ("Horovod", f"{software.horovod or 'none'}{f', built for {parts}' if parts else ''}"),
        ("wheel", software.wheel or "none"),
        ("MPI", machine.mpi or "none"),
        ("NCCL", machine.nccl or "none"),
        ("compiler", machine.compiler or "none"),
        ("GPU driver", f"for CUDA {machine.driver_cuda}" if machine.driver_cuda else "none"),
    ]


def describe_machine(machine: MachineFacts) -> list[tuple[str, str]]:
    """Return the lines on GPUs, CPU and memory."""
    allowed = f", time of {machine.cores_allowed:g} allowed" if machine.cores_allowed else ""
    load = f", load {machine.load:.1f}" if machine.load is not None else ""
    limit = f", {format_bytes(machine.memory_allowed)} allowed" if machine.memory_allowed else ""
    memory = f"{format_bytes(machine.memory or 0)}, {format_bytes(machine.memory_free or 0)} free{limit}"
    return [
        *(("GPU", gpu) for gpu in machine.gpus or ["none"]),
        ("CPU", str(machine.cpu)),
        ("cores", f"{machine.cores}, {machine.cores_usable} usable{allowed}{load}"),
        ("memory", memory),
    ]


def describe_disk(disk: DiskFacts) -> str:
    """Return free and total bytes of a disk as text."""
    if disk.free is None or disk.total is None:
        return str(disk.error)
    error = f", {disk.error}" if disk.error else ""
    return f"{format_bytes(disk.free)} of {format_bytes(disk.total)} free{error}"


def describe_interface(nic: InterfaceFacts) -> str:
    """Return an interface as text."""
    speed = f", {nic.speed} Mbit/s" if nic.speed else ""
    return f"{', '.join(nic.addresses) or 'no address'}, {'up' if nic.up else 'down'}, mtu {nic.mtu}{speed}"


def tabulate_differences(replies: Sequence[HostReply]) -> str:
    """Return a table of the facts that differ between hosts, a row each; "" if none does."""
    valid = [reply for reply in replies if not reply.error]
    columns = [list_compared_facts(reply.facts) for reply in valid]
    rows = []
    for entries in zip(*columns, strict=True):
        name, values = entries[0][0], [format_cell(value) for _, value in entries]
        if len(set(values)) > 1 and not (name == "hostname" and values == [reply.host for reply in valid]):
            rows.append([name, *values])
    if not rows:
        return ""
    rows.insert(0, ["", *(reply.host for reply in valid)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def list_compared_facts(facts: HostFacts) -> list[tuple[str, object]]:
    """Return the rows of the table for a host: free bytes and addresses are left out, they always differ."""
    software, machine = facts.software, facts.machine or MachineFacts()
    return [
        ("hostname", facts.hostname),
        ("system", machine.system),
        ("python", software.python),
        ("executable", software.executable),
        ("hvdtrain", software.hvdtrain),
        ("torch", software.torch),
        ("horovod", software.horovod),
        ("wheel", software.wheel),
        ("mpi", machine.mpi),
        ("nccl", machine.nccl),
        ("compiler", machine.compiler),
        ("driver cuda", machine.driver_cuda),
        ("gpus", machine.gpus),
        ("cpu", machine.cpu),
        ("cores usable", machine.cores_usable),
        ("cores allowed", machine.cores_allowed),
        ("memory", machine.memory),
        ("memory allowed", machine.memory_allowed),
        ("interfaces", facts.interfaces),
    ]


def format_cell(value: object) -> str:
    """Return a fact as a cell of the table."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def format_verdict(found: Sequence[DoctorFinding]) -> str:
    """Return the last line: all fine, or the worst that was found."""
    if not found:
        return "all fine"
    return str(found[0]) if found[0].bad else f"warning: {found[0]}"
