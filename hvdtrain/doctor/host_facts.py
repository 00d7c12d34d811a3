"""The facts of a host as dataclasses, and as one line of JSON that a host sends to the one that asks.

The keys of the JSON are part of `hvdtrain doctor --json`. A host may run another version of hvdtrain: entries that are
unknown here are ignored, and a fact that was not sent is None or empty.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hvdtrain.system.records import encode_record, named, parse_record
from hvdtrain.system.strict_json import parse_strict_json

FACTS_MARKER = "##hvdtrain-facts "  # before the facts in the output: a login shell may print too
UNKNOWN_WHEEL = "(unknown)"  # the wheel of a Horovod that hvdtrain has not built


@dataclass(frozen=True)
class FactsRequest:
    """What a host is asked for.

    Attributes:
        folders: how full the disks of these are, besides that of temporary files.
        back: an address and a port to which the host tries to connect.
        full: whether to look at what takes up to a second, too: MPI, GPUs, compiler, network.
        programs: files that must be executable there.
        files: files that must be readable there.
    """

    folders: list[str] = field(default_factory=list)
    back: tuple[str, int] | None = None
    full: bool = True
    programs: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DiskFacts:
    """The disk of a folder: bytes, None if unknown, and why nothing can be written there, None if it can."""

    free: int | None = None
    total: int | None = None
    error: str | None = field(default=None, metadata=named("wrong"))


@dataclass(frozen=True)
class BuildVersions:
    """What Horovod is built for: versions, None for what it is built without."""

    torch: str | None = None
    mpi: str | None = None
    nccl: str | None = None
    cuda: str | None = None


@dataclass(frozen=True)
class SoftwareFacts:
    """Python and what is installed in it: versions, None for what is not there.

    Attributes:
        torch_cuda: version of CUDA that torch is built for.
        wheel: key of the installed Horovod in the cache of builds, or UNKNOWN_WHEEL.
        built_with: None if hvdtrain did not build Horovod.
        horovod_error: one line with why Horovod cannot work and what to do; None if it can.
    """

    python: str | None = None
    executable: str | None = None
    hvdtrain: str | None = None
    torch: str | None = None
    torch_cuda: str | None = field(default=None, metadata=named("torch cuda"))
    horovod: str | None = None
    wheel: str | None = None
    built_with: BuildVersions | None = field(default=None, metadata=named("built with"))
    horovod_error: str | None = field(default=None, metadata=named("horovod wrong"))


@dataclass(frozen=True)
class MachineFacts:
    """Cores, memory, devices and programs; what a container may use is next to what its machine has.

    Attributes:
        cores: all of the machine. cores_usable: those that this process may run on.
        cores_allowed: cores whose time the control group may use, None for all.
        load: processes that are running or ready to run, the mean of a minute.
        memory, memory_free, memory_allowed: bytes; allowed by the control group, None for all.
        limits: soft resource limits by name: nofile, memlock in bytes, nproc; None for no limit.
        driver_cuda: the newest CUDA that the GPU driver supports.
        gpus: a line for each GPU; or one that begins with "nvidia-smi" and reports how that fails.
        infiniband: names of the devices.
    """

    system: str | None = None
    cpu: str | None = None
    cores: int | None = None
    cores_usable: int | None = field(default=None, metadata=named("cores usable"))
    cores_allowed: float | None = field(default=None, metadata=named("cores allowed"))
    load: float | None = None
    memory: int | None = None
    memory_free: int | None = field(default=None, metadata=named("memory free"))
    memory_allowed: int | None = field(default=None, metadata=named("memory allowed"))
    shared_memory: DiskFacts = field(default_factory=DiskFacts, metadata=named("shared memory"))
    limits: dict[str, int | None] = field(default_factory=dict)
    mpi: str | None = None
    compiler: str | None = None
    nccl: str | None = None
    driver_cuda: str | None = field(default=None, metadata=named("driver cuda"))
    gpus: list[str] = field(default_factory=list)
    infiniband: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class InterfaceFacts:
    """A network interface: its IPv4 addresses, state, speed in Mbit/s (None if unknown) and MTU in bytes."""

    addresses: list[str] = field(default_factory=list)
    up: bool = False
    speed: int | None = None
    mtu: int | None = None


@dataclass(frozen=True)
class NetworkFacts:
    """The network as the host sees it.

    Attributes:
        nics: interfaces by name.
        routes: as text, `10.0.0.0/24 dev eth0`.
        own_addresses: IPv4 addresses to which the host's name resolves there; empty if it does not resolve.
    """

    nics: dict[str, InterfaceFacts] = field(default_factory=dict)
    routes: list[str] = field(default_factory=list)
    own_addresses: list[str] = field(default_factory=list, metadata=named("own name"))


@dataclass(frozen=True)
class HostFacts:
    """All facts of one host.

    Attributes:
        disks: by folder.
        interfaces: names of the network interfaces.
        time: the host's clock, seconds since the epoch, when the facts were complete.
        machine, network: None unless the request was `full`.
        file_errors: by file that was asked for, what is wrong with it.
        asked_back: whether the host was asked to connect back. back_error: why it could not; None if it could.
    """

    hostname: str = ""
    software: SoftwareFacts = field(default_factory=SoftwareFacts)
    disks: dict[str, DiskFacts] = field(default_factory=dict)
    interfaces: list[str] = field(default_factory=list)
    time: float = 0.0
    machine: MachineFacts | None = None
    network: NetworkFacts | None = None
    file_errors: dict[str, str] = field(default_factory=dict)
    asked_back: bool = False
    back_error: str | None = None

    def encode_json(self) -> dict[str, object]:
        """Return the facts as one flat JSON object."""
        back = {"way back": self.back_error} if self.asked_back else {}
        return {
            "hostname": self.hostname,
            **encode_record(self.software),
            "disks": encode_record(self.disks),
            **(encode_record(self.machine) if self.machine is not None else {}),
            "interfaces": self.interfaces,
            **(encode_record(self.network) if self.network is not None else {}),
            **({"file errors": self.file_errors} if self.file_errors else {}),
            **back,
            "time": self.time,
        }


@dataclass(frozen=True)
class _PlainFacts:
    """The entries of the flat JSON object that no other dataclass has."""

    time: float
    hostname: str = ""
    disks: dict[str, DiskFacts] = field(default_factory=dict)
    interfaces: list[str] = field(default_factory=list)
    file_errors: dict[str, str] = field(default_factory=dict, metadata=named("file errors"))
    back_error: str | None = field(default=None, metadata=named("way back"))


def format_facts_line(facts: HostFacts) -> str:
    """Return the line in which a host sends its facts."""
    return f"{FACTS_MARKER}{json.dumps(facts.encode_json())}\n"


def find_facts_line(output: str) -> HostFacts | None:
    """Return the facts in what a host printed, None if there are none.

    Raises:
        ValueError: a fact is not of the type that it should have.
    """
    start = output.find(FACTS_MARKER)
    if start < 0:
        return None
    value = parse_strict_json(output[start + len(FACTS_MARKER) :].partition("\n")[0].encode())
    plain: _PlainFacts = parse_record(value, _PlainFacts)
    return HostFacts(
        hostname=plain.hostname,
        software=parse_record(value, SoftwareFacts),
        disks=plain.disks,
        interfaces=plain.interfaces,
        time=plain.time,
        machine=parse_record(value, MachineFacts) if "gpus" in value else None,
        network=parse_record(value, NetworkFacts) if "nics" in value else None,
        file_errors=plain.file_errors,
        asked_back="way back" in value,
        back_error=plain.back_error,
    )


def dump_request(request: FactsRequest) -> str:
    """Return a request as the argument of `python -m hvdtrain.doctor.facts`."""
    return json.dumps(encode_record(request))


def parse_request(text: str) -> FactsRequest:
    """Return the request in an argument. Raises ValueError."""
    request: FactsRequest = parse_record(parse_strict_json(text.encode()), FactsRequest)
    return request
