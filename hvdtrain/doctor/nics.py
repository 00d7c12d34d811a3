"""The network as this host has it: interfaces, routes, and to which addresses its own name resolves."""

from __future__ import annotations

import socket
import struct

import psutil

from hvdtrain.doctor.host_facts import InterfaceFacts, NetworkFacts
from hvdtrain.doctor.readings import read_stripped_text


def gather_network_facts() -> NetworkFacts:
    """Return interfaces, routes and the host's own addresses."""
    states = psutil.net_if_stats()
    nics = {}
    for name, addresses in psutil.net_if_addrs().items():
        state = states.get(name)
        nics[name] = InterfaceFacts(
            addresses=[one.address for one in addresses if one.family == socket.AF_INET],
            up=bool(state and state.isup),
            speed=state.speed if state and 0 < state.speed < 65535 else None,
            mtu=state.mtu if state else None,
        )
    return NetworkFacts(nics, parse_routes(read_stripped_text("/proc/net/route") or ""), resolve_own_name())


def resolve_own_name() -> list[str]:
    """Return the IPv4 addresses to which this host's own name resolves here; none if it does not resolve."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({str(address[0]) for *_, address in found})


def parse_routes(table: str) -> list[str]:
    """Return the kernel's routing table as text: `10.0.0.0/24 dev eth0`, `default via 10.0.0.1 dev eth0`."""
    found = []
    for line in table.splitlines()[1:]:
        name, target, gateway, *_, mask = line.split()[:8]
        bits = int(mask, 16).bit_count()
        destination = "default" if not bits else f"{parse_hex_address(target)}/{bits}"
        via = f" via {parse_hex_address(gateway)}" if int(gateway, 16) else ""
        found.append(f"{destination}{via} dev {name}")
    return found


def parse_hex_address(text: str) -> str:
    """Return an address that the kernel wrote as hexadecimal digits in its own byte order."""
    return socket.inet_ntoa(struct.pack("=I", int(text, 16)))
