"""Which network interface joins the hosts, and which hosts are this one."""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Iterable, Sequence

import psutil

from hvdtrain.system.errors import UserError
from hvdtrain.system.processes import ProcessTimeout, run_process


def interface_toward(hosts: Iterable[str]) -> str:
    """The interface by which this host reaches the others: `lo` where all are called localhost.

    Raises UserError for a name that does not resolve, and where there is no one interface to take.
    """
    names = list(hosts)
    others = [name for name in names if not is_local_host(name)]
    found: dict[str, str] = {}
    for name in others or names:
        interface = _outgoing_interface(name)
        # That a host has its own name at a loopback address tells nothing of how others reach it.
        if others or interface != "lo" or name in ("localhost", "127.0.0.1"):
            found.setdefault(interface, name)
    if len(found) == 1:
        return next(iter(found))
    ways = ", ".join(f"{interface} to {name}" for interface, name in found.items()) or "only this host is known yet"
    raise UserError(f"--nic is needed: which interface joins the hosts cannot be told ({ways})")


def is_local_host(name: str) -> bool:
    """Whether a host is this one; not if its name does not resolve."""
    try:
        own = resolve_address(name)
    except UserError:
        return False
    return ipaddress.ip_address(own).is_loopback or any(
        one.address == own for addresses in psutil.net_if_addrs().values() for one in addresses
    )


def resolve_address(name: str) -> str:
    """The IPv4 address of a host; a name that only ssh's configuration knows is looked up there.

    Raises UserError for a name that resolves to none.
    """
    for known_as in (name, ssh_hostname(name)):
        try:
            found = socket.getaddrinfo(known_as, 9, socket.AF_INET, socket.SOCK_DGRAM)
        except OSError:
            continue
        return str(found[0][4][0])
    raise UserError(f"host {name!r} does not resolve to an IPv4 address (--nic is needed where only ssh knows the way)")


def interface_address(interface: str) -> str:
    """The IPv4 address of one of this host's interfaces. Raises UserError if it has none."""
    for one in psutil.net_if_addrs().get(interface, []):
        if one.family == socket.AF_INET:
            return str(one.address)
    raise UserError(f"{socket.gethostname()} has no network interface {interface!r} with an IPv4 address")


def local_address_toward(name: str) -> str:
    """This host's IPv4 address on the way to another one. Raises UserError where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((resolve_address(name), 9))  # sends nothing
        except OSError as error:
            raise UserError(f"there is no route to host {name!r}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def ssh_hostname(name: str) -> str:
    """The name that ssh's configuration has for a host; the same name where there is no other, or no ssh."""
    told = [line.partition(" ")[2] for line in _read_ssh_config(name) if line.startswith("hostname ")]
    return told[0] if told else name


def build_ssh_command(host: str, remote: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """The ssh that runs a command on a host without a question; ssh's own configuration decides on host keys.

    options: more for ssh. Raises UserError for a host that ssh would take for an option.
    """
    if host.startswith("-"):
        raise UserError(f"{host!r} is not a host name: it begins with -")
    return ["ssh", *options, "-o", "BatchMode=yes", *host_key_options(host, tuple(options)), "--", host, *remote]


@functools.cache
def host_key_options(host: str, options: tuple[str, ...]) -> tuple[str, ...]:
    """What is said to ssh of unknown host keys: nothing if it is configured, else to take the first key of a host."""
    # `ask` is what ssh says if nothing is configured; there is no terminal to ask on.
    asks = "stricthostkeychecking ask" in _read_ssh_config(host, options)
    return ("-o", "StrictHostKeyChecking=accept-new") if asks else ()


def _read_ssh_config(host: str, options: Sequence[str] = ()) -> list[str]:
    """The lines of ssh's configuration for a host; none if there is no ssh."""
    command = ["ssh", "-G", *options, "--", host]
    try:
        done = run_process(command, 10.0)
    except (OSError, ProcessTimeout):
        return []
    return done.stdout.splitlines()


def _outgoing_interface(name: str) -> str:
    """The interface by which packets to a host leave."""
    own = local_address_toward(name)
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            return interface
    raise UserError(f"no interface has the address {own} from which host {name!r} is reached")
