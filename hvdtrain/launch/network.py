"""Which network interface joins the hosts."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil

from hvdtrain.errors import UserError


def interface_to(hosts: Iterable[str]) -> str:
    """The interface by which this host reaches the others: `lo` where it is the only one.

    Raises UserError for a name that does not resolve, and where there is no one interface to take.
    """
    found: dict[str, str] = {}
    names = list(hosts)
    for name in names:
        interface = _route(name)
        if interface != "lo" or name in ("localhost", "127.0.0.1"):
            found.setdefault(interface, name)
    beyond = {interface: name for interface, name in found.items() if interface != "lo"}
    if len(beyond) == 1 and len(found) == 1:
        return next(iter(beyond))
    if not beyond and set(found) == {"lo"} and len(names) == 1:
        return "lo"
    ways = ", ".join(f"{interface} to {name}" for interface, name in found.items()) or "only this host is known yet"
    raise UserError(f"--nic is needed: which interface joins the hosts cannot be told ({ways})")


def _route(name: str) -> str:
    """The interface by which packets to a host leave."""
    try:
        address = socket.getaddrinfo(name, 9, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
    except OSError:
        raise UserError(f"host {name!r} does not resolve to an IPv4 address") from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)  # sends nothing
        except OSError as error:
            raise UserError(f"there is no route to host {name!r}: {error.strerror}") from None
        own = probe.getsockname()[0]
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            return interface
    raise UserError(f"no interface has the address {own} from which host {name!r} is reached")
