"""The network as this host has it: interfaces and routes."""

from __future__ import annotations

import socket
import struct

import psutil

from hvdtrain.doctor.facts import Facts, read_stripped_text


def gather_network_facts() -> Facts:
    """Interfaces with their addresses, state, speed in Mbit/s (None if unknown) and mtu; and the routes."""
    states = psutil.net_if_stats()
    nics = {}
    for name, addresses in psutil.net_if_addrs().items():
        state = states.get(name)
        nics[name] = {
            "addresses": [one.address for one in addresses if one.family == socket.AF_INET],
            "up": bool(state and state.isup),
            "speed": state.speed if state and 0 < state.speed < 65535 else None,
            "mtu": state.mtu if state else None,
        }
    return {
        "interfaces": sorted(nics),
        "nics": nics,
        "routes": parse_routes(read_stripped_text("/proc/net/route") or ""),
    }


def parse_routes(table: str) -> list[str]:
    """The routes of the kernel's table in words: `10.0.0.0/24 dev eth0`, `default via 10.0.0.1 dev eth0`."""
    found = []
    for line in table.splitlines()[1:]:
        name, target, gateway, *_, mask = line.split()[:8]
        bits = int(mask, 16).bit_count()
        where = "default" if not bits else f"{parse_hex_address(target)}/{bits}"
        via = f" via {parse_hex_address(gateway)}" if int(gateway, 16) else ""
        found.append(f"{where}{via} dev {name}")
    return found


def parse_hex_address(text: str) -> str:
    """An address that the kernel wrote as hexadecimal digits, in its own order of bytes."""
    return socket.inet_ntoa(struct.pack("=I", int(text, 16)))
