"""Find which network interface joins the hosts, and which hosts are this one."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

import psutil

from hvdtrain.system.errors import UserError
from hvdtrain.system.ssh import ssh_hostname


def interface_toward(hosts: Iterable[str]) -> str:
    """Return the interface by which this host reaches the others: `lo` if all of them are called localhost.

    Raises:
        UserError: a name does not resolve, or several interfaces, or none, lead to the hosts.
    """
    names = list(hosts)
    others = [name for name in names if not is_local_host(name)]
    found: dict[str, str] = {}
    for name in others or names:
        interface = _outgoing_interface(name)
        # A host's own name may resolve to a loopback address, which does not show how others reach it.
        if others or interface != "lo" or name in ("localhost", "127.0.0.1"):
            found.setdefault(interface, name)
    if len(found) == 1:
        return next(iter(found))
    ways = ", ".join(f"{interface} to {name}" for interface, name in found.items()) or "only this host is known yet"
    raise UserError(f"--nic is needed: cannot tell which interface joins the hosts ({ways})")


def is_local_host(name: str) -> bool:
    """Return whether a host is this one; False if its name does not resolve."""
    try:
        own = resolve_address(name)
    except UserError:
        return False
    return ipaddress.ip_address(own).is_loopback or any(
        one.address == own for addresses in psutil.net_if_addrs().values() for one in addresses
    )


def resolve_address(name: str) -> str:
    """Return the IPv4 address of a host; a name that only ssh's configuration knows is looked up there.

    Raises:
        UserError: the name does not resolve.
    """
    for find_name in (str, ssh_hostname):  # ssh is only asked, by a process, about a name that does not resolve
        try:
            found = socket.getaddrinfo(find_name(name), 9, socket.AF_INET, socket.SOCK_DGRAM)
        except OSError:
            continue
        return str(found[0][4][0])
    raise UserError(f"host {name!r} does not resolve to an IPv4 address (--nic is needed if only ssh can reach it)")


def interface_address(interface: str) -> str:
    """Return the IPv4 address of one of this host's interfaces. Raises UserError if it has none."""
    for one in psutil.net_if_addrs().get(interface, []):
        if one.family == socket.AF_INET:
            return str(one.address)
    raise UserError(f"{socket.gethostname()} has no network interface {interface!r} with an IPv4 address")


def local_address_toward(name: str) -> str:
    """Return this host's IPv4 address on the route to another one. Raises UserError if there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((resolve_address(name), 9))  # sends nothing
        except OSError as error:
            raise UserError(f"there is no route to host {name!r}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def _outgoing_interface(name: str) -> str:
    """Return the interface by which packets to a host leave."""
    own = local_address_toward(name)
    if (interface := find_interface(own)) is None:
        raise UserError(f"no interface has the address {own} from which host {name!r} is reached")
    return interface


def find_interface(address: str) -> str | None:
    """Return this host's interface that has an address; None if there is none."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == address for one in addresses)), None)
